"""The stacks: they only wire constructs and print outputs. `build` makes them all; `app.py` and the tests call it.

{name}-data      network, bucket, shared file system: what may outlive the rest; deployed first
{name}-image     the image's recipe and pipeline, with image.kind = "baked"
{name}-service   fleet, load balancer, endpoint, observability: everything that can be made again
"""

from pathlib import Path

import aws_cdk as cdk
from constructs import Construct

from infra.admin_key import AdminKey
from infra.artifact import ServerArtifact
from infra.config import KitConfig
from infra.cost import cost_text
from infra.custom_resources import bound_providers
from infra.endpoint import Endpoint
from infra.fleet import GpuFleet
from infra.gateway_key import GatewayKey
from infra.image import ServerImage
from infra.image_pipeline import ImagePipeline
from infra.load_balancer import LoadBalancer
from infra.model import EMBEDDED_DIR, BaseModel
from infra.network import Network
from infra.observability import Observability
from infra.operations import Operations
from infra.scaling import Scaling
from infra.storage import Bucket, make_shared_files


class KitStack(cdk.Stack):
    """What the stacks have in common: name, region, protection, boundary. No account: synth looks nothing up."""

    def __init__(self, scope: Construct, part: str, *, config: KitConfig, what: str) -> None:
        boundary = config.permissions_boundary
        super().__init__(
            scope,
            f"{config.name}-{part}",
            description=f"{config.name}: {what}",
            env=cdk.Environment(region=config.region) if config.region else None,
            termination_protection=config.retain_data,
            permissions_boundary=cdk.PermissionsBoundary.from_arn(boundary) if boundary else None,
        )
        self.config = config
        for key, value in config.tags.items():
            cdk.Tags.of(self).add(key, value)

    def output(self, id: str, value: str, description: str) -> None:
        """A line that `cdk deploy` prints, the same name in each version of the kit: scripts read it."""
        cdk.CfnOutput(self, id, value=value, description=description)


class DataStack(KitStack):
    """network, bucket, shared_files."""

    def __init__(self, scope: Construct, *, config: KitConfig) -> None:
        super().__init__(scope, "data", config=config, what="network, bucket and shared file system")
        self.network = Network(self, "Network", config=config)
        self.bucket = Bucket(self, "Bucket", config=config)
        self.shared_files = make_shared_files(self, config=config, network=self.network, bucket=self.bucket)
        self.output("BucketName", self.bucket.bucket.bucket_name, "base models and adapters")
        if config.retain_data:
            self.output("KeptOnDestroy", "bucket, its access logs, shared file system", "stays when the stacks go; delete it by hand")
        bound_providers(self, config)


class ImageStack(KitStack):
    """pipeline. Deployed before the service stack, whose fleet needs an image: start the pipeline once, then deploy the service."""

    def __init__(self, scope: Construct, *, config: KitConfig, data: DataStack) -> None:
        super().__init__(scope, "image", config=config, what="recipe and pipeline of the fleet's image")
        self.pipeline = ImagePipeline(
            self, "ImagePipeline", config=config, network=data.network, bucket=data.bucket, artifact=ServerArtifact(self, "ServerArtifact")
        )
        self.output("StartImagePipeline", self.pipeline.start_command, "makes an image (about 40 minutes); the next deploy takes it")
        self.output("ImageParameter", self.pipeline.parameter_name, "names the newest image")


class ServiceStack(KitStack):
    """model, fleet, load_balancer, endpoint, scaling, observability, operations."""

    def __init__(self, scope: Construct, *, config: KitConfig, data: DataStack, embedded_dir: Path) -> None:
        super().__init__(scope, "service", config=config, what="fleet and endpoint")
        self.model = BaseModel(
            self, "BaseModel", config=config, bucket=data.bucket, shared_files=data.shared_files, embedded_dir=embedded_dir
        )
        admin_key = AdminKey(self, "AdminKey", config=config)
        gateway_key = GatewayKey(self, "GatewayKey", config=config)
        self.load_balancer = LoadBalancer(self, "LoadBalancer", config=config, network=data.network)
        self.fleet = GpuFleet(
            self,
            "GpuFleet",
            config=config,
            network=data.network,
            bucket=data.bucket,
            shared_files=data.shared_files,
            image=ServerImage(self, "ServerImage", config=config),
            model=self.model,
            target_group=self.load_balancer.target_group,
            artifact=ServerArtifact(self, "ServerArtifact"),
            admin_key=admin_key,
            gateway_key=gateway_key,
        )
        self.endpoint = Endpoint(
            self,
            "Endpoint",
            config=config,
            network=data.network,
            load_balancer=self.load_balancer,
            admin_key=admin_key,
            gateway_key=gateway_key,
        )
        self.scaling = Scaling(self, "Scaling", config=config, fleet=self.fleet, load_balancer=self.load_balancer)
        self.observability = Observability(
            self, "Observability", config=config, fleet=self.fleet, load_balancer=self.load_balancer, endpoint=self.endpoint
        )
        self.operations = Operations(self, "Operations", config=config, fleet=self.fleet, bucket=data.bucket)
        self.output("HourlyCost", cost_text(config), "what runs, whether or not anybody calls")
        bound_providers(self, config)


def build(app: Construct, config: KitConfig, *, embedded_dir: Path = EMBEDDED_DIR) -> list[cdk.Stack]:
    """All stacks of one environment, in the order of their deploy. `embedded_dir`: where `make model` put the embedded model."""
    data = DataStack(app, config=config)
    service = ServiceStack(app, config=config, data=data, embedded_dir=embedded_dir)
    service.add_stack_dependency(data)
    if config.image.kind != "baked":
        return [data, service]
    image = ImageStack(app, config=config, data=data)
    service.add_stack_dependency(image)
    return [data, image, service]

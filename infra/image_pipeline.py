"""ImagePipeline: makes images that hold the server, its packages and compiled kernels (ami/), tries them, and names the newest one.

Owns recipe, pipeline, the role of the machine that bakes, and how many images are kept. The recipe's name carries the digest of all that it
is made of, since Image Builder's recipes never change. `image` names the parameter that comes out. The image stack makes one.
"""

import hashlib
import json

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_imagebuilder as imagebuilder
from constructs import Construct

from infra.acknowledge import acknowledge, nag_name
from infra.artifact import ROOT, ServerArtifact
from infra.config import KitConfig
from infra.fleet_role import SESSION_ACTIONS
from infra.image import baked_parameter, parent_parameter
from infra.network import Network
from infra.removal import data_key
from infra.storage import Bucket

COMPONENT = ROOT / "ami" / "component.yml"
VERSION = "1.0.0"  # every change of content is another name
KEEP_IMAGES = 3
KEEP_USED_MONTHS = 3  # a fleet that is not deployed launches from the image of its last deploy, however many came since
_MOUNTS = {"efs": "efs", "s3files": "s3files", "fsx": "lustre"}
_OWN_BUCKETS = "ec2imagebuilder*"  # Image Builder's: what it starts the machine's work with (EC2InstanceProfileForImageBuilder)
_STAR_REASONS = {
    "IAM5[Resource::*]": "the service demands it: Session Manager's calls, by which Image Builder steers the machine, know no resources",
    "IAM5[Resource::arn:<AWS::Partition>:imagebuilder:<AWS::Region>:<AWS::AccountId>:component/*]": "components that the recipe names",
    f"IAM5[Resource::arn:<AWS::Partition>:s3:::{_OWN_BUCKETS}]": "the service's own buckets, in each region another",
    "IAM5[Resource::arn:<AWS::Partition>:logs:<AWS::Region>:<AWS::AccountId>:log-group:/aws/imagebuilder/*]": "the service's groups",
}


def recipe_digest(config: KitConfig, artifact: ServerArtifact) -> str:
    """Of all that a recipe is made of. A change of any replaces the recipe, and the new one cannot have the old one's name."""
    image = config.image
    parts = [artifact.digest, image.version, image.ami_line, image.wheelhouse_prefix, config.storage.kind, config.fleet.root_gib]
    return hashlib.sha256(json.dumps([*parts, config.kms_key_arn, config.tags], sort_keys=True).encode()).hexdigest()


class ImagePipeline(Construct):
    """pipeline; recipe; role: of the machine that bakes; parameter_name: SSM parameter with the newest image's id."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, network: Network, bucket: Bucket, artifact: ServerArtifact) -> None:
        super().__init__(scope, id)
        self._config = config
        self.parameter_name = baked_parameter(config)
        self._name = f"{config.name}-{artifact.lock[:8]}-{recipe_digest(config, artifact)[:8]}"
        self.role = self._make_role(artifact, bucket)
        self.recipe = self._make_recipe(artifact, bucket)
        self.pipeline = imagebuilder.CfnImagePipeline(
            self,
            "Pipeline",
            name=config.name,
            image_recipe_arn=self.recipe.attr_arn,
            infrastructure_configuration_arn=self._make_infrastructure(network).attr_arn,
            distribution_configuration_arn=self._make_distribution().attr_arn,
            enhanced_image_metadata_enabled=True,
            image_tags=self._tags(),  # by these the lifecycle policy finds images; those of the recipe are the AMI's
            image_tests_configuration=imagebuilder.CfnImagePipeline.ImageTestsConfigurationProperty(
                image_tests_enabled=True, timeout_minutes=90
            ),
            schedule=imagebuilder.CfnImagePipeline.ScheduleProperty(
                schedule_expression=config.image.schedule,
                # A new parent image or component, else there is nothing new to bake.
                pipeline_execution_start_condition="EXPRESSION_MATCH_AND_DEPENDENCY_UPDATES_AVAILABLE",
            )
            if config.image.schedule
            else None,
        )
        self._make_lifecycle()

    @property
    def start_command(self) -> str:
        """What makes an image now."""
        return f"aws imagebuilder start-image-pipeline-execution --image-pipeline-arn {self.pipeline.attr_arn}"

    def _make_recipe(self, artifact: ServerArtifact, bucket: Bucket) -> imagebuilder.CfnImageRecipe:
        config, wheels = self._config, self._config.image.wheelhouse_prefix
        component = imagebuilder.CfnComponent(
            self, "Component", name=self._name, platform="Linux", version=VERSION, data=COMPONENT.read_text(encoding="utf-8")
        )
        parameters = {
            "ArtifactUri": artifact.uri,
            "MountKind": _MOUNTS[config.storage.kind],
            "WheelhouseUri": f"s3://{bucket.bucket.bucket_name}/{wheels}" if wheels else "none",
        }
        key = data_key(self, config)
        root = imagebuilder.CfnImageRecipe.EbsInstanceBlockDeviceSpecificationProperty(
            volume_size=config.fleet.root_gib,
            volume_type="gp3",
            encrypted=True,
            kms_key_id=key.key_arn if key else None,
            delete_on_termination=True,
        )
        pinned = config.image.version
        return imagebuilder.CfnImageRecipe(
            self,
            "Recipe",
            name=self._name,
            version=VERSION,
            parent_image=f"ssm:{parent_parameter(config)}" if pinned == "latest" else pinned,
            components=[
                imagebuilder.CfnImageRecipe.ComponentConfigurationProperty(
                    component_arn=component.attr_arn,
                    parameters=[
                        imagebuilder.CfnImageRecipe.ComponentParameterProperty(name=name, value=[value])
                        for name, value in parameters.items()
                    ],
                )
            ],
            block_device_mappings=[
                imagebuilder.CfnImageRecipe.InstanceBlockDeviceMappingProperty(device_name="/dev/sda1", ebs=root),
            ],
            ami_tags=self._tags() | {"manylora:lock": artifact.lock, "manylora:artifact": artifact.digest},
        )

    def _make_infrastructure(self, network: Network) -> imagebuilder.CfnInfrastructureConfiguration:
        """A machine of the fleet's own type, so that kernels are compiled for its GPU. It needs a way out to the packages: the fleet's
        subnet with one, else the account's default VPC, unless a wheelhouse makes it needless."""
        config = self._config
        inside = config.network.has_way_out or config.network.vpc_id is not None or config.image.wheelhouse_prefix is not None
        profile = iam.CfnInstanceProfile(self, "Profile", roles=[self.role.role_name])
        subnets = network.fleet_subnets.subnets or network.vpc.select_subnets(subnet_type=network.fleet_subnets.subnet_type).subnets
        return imagebuilder.CfnInfrastructureConfiguration(
            self,
            "Infrastructure",
            name=self._name,
            instance_profile_name=profile.ref,
            instance_types=list(dict.fromkeys((config.fleet.instance_type, *config.fleet.fallback_types))),
            subnet_id=subnets[0].subnet_id if inside else None,
            security_group_ids=[network.fleet_security_group.security_group_id] if inside else None,
            terminate_instance_on_failure=True,
            instance_metadata_options=imagebuilder.CfnInfrastructureConfiguration.InstanceMetadataOptionsProperty(
                http_tokens="required", http_put_response_hop_limit=1
            ),
            resource_tags=self._tags(),
        )

    def _make_distribution(self) -> imagebuilder.CfnDistributionConfiguration:
        distribution = imagebuilder.CfnDistributionConfiguration.DistributionProperty(
            region=cdk.Aws.REGION,
            ami_distribution_configuration={"Name": f"{self._config.name}-{{{{ imagebuilder:buildDate }}}}", "AmiTags": self._tags()},
            ssm_parameter_configurations=[
                imagebuilder.CfnDistributionConfiguration.SsmParameterConfigurationProperty(
                    parameter_name=self.parameter_name, data_type="aws:ec2:image"
                )
            ],
        )
        return imagebuilder.CfnDistributionConfiguration(self, "Distribution", name=self._name, distributions=[distribution])

    def _make_lifecycle(self) -> None:
        """Older images go with their snapshots, which cost by the gigabyte."""
        role = iam.Role(self, "LifecycleRole", assumed_by=iam.ServicePrincipal("imagebuilder.amazonaws.com"))
        managed = "service-role/EC2ImageBuilderLifecycleExecutionPolicy"
        role.add_managed_policy(iam.ManagedPolicy.from_aws_managed_policy_name(managed))
        reason = "the service's own policy for this role; it is bound to images that Image Builder made"
        acknowledge(role, {f"IAM4[Policy::arn:<AWS::Partition>:iam::aws:policy/{managed}]": reason})
        policy = imagebuilder.CfnLifecyclePolicy
        policy(
            self,
            "Lifecycle",
            name=self._config.name,
            execution_role=role.role_arn,
            resource_type="AMI_IMAGE",
            policy_details=[
                policy.PolicyDetailProperty(
                    action=policy.ActionProperty(
                        type="DELETE", include_resources=policy.IncludeResourcesProperty(amis=True, snapshots=True)
                    ),
                    filter=policy.FilterProperty(type="COUNT", value=KEEP_IMAGES),
                    exclusion_rules=policy.ExclusionRulesProperty(
                        amis=policy.AmiExclusionRulesProperty(
                            last_launched=policy.LastLaunchedProperty(unit="MONTHS", value=KEEP_USED_MONTHS)
                        )
                    ),
                )
            ],
            resource_selection=policy.ResourceSelectionProperty(tag_map=self._tags()),
        )

    def _make_role(self, artifact: ServerArtifact, bucket: Bucket) -> iam.Role:
        role = iam.Role(
            self, "Role", assumed_by=iam.ServicePrincipal("ec2.amazonaws.com"), description=f"{self._config.name}: bakes images"
        )
        for service, actions in SESSION_ACTIONS.items():
            role.add_to_policy(iam.PolicyStatement(actions=[f"{service}:{action}" for action in actions], resources=["*"]))
        stack = cdk.Stack.of(self)
        components = stack.format_arn(service="imagebuilder", resource="component", resource_name="*")
        role.add_to_policy(iam.PolicyStatement(actions=["imagebuilder:GetComponent"], resources=[components]))
        buckets = stack.format_arn(service="s3", region="", account="", resource=_OWN_BUCKETS)
        role.add_to_policy(iam.PolicyStatement(actions=["s3:GetObject"], resources=[buckets]))
        groups = stack.format_arn(
            service="logs", resource="log-group", resource_name="/aws/imagebuilder/*", arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME
        )
        writing = ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"]
        role.add_to_policy(iam.PolicyStatement(actions=writing, resources=[groups]))
        artifact.grant_read(role)
        if wheels := self._config.image.wheelhouse_prefix:
            bucket.grant_read(role, [wheels])
            name = nag_name(self, bucket, bucket.bucket.bucket_arn)
            acknowledge(role, {f"IAM5[Resource::{name}/{wheels}*]": "whatever wheels lie under this prefix"})
        if key := data_key(self, self._config):
            key.grant_decrypt(role)
        acknowledge(role, _STAR_REASONS)
        return role

    def _tags(self) -> dict[str, str]:
        return {"manylora:name": self._config.name}

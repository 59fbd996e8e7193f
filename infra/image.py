"""ServerImage: which AMI the fleet starts from.

Owns the names of AWS's public parameters for the Deep Learning AMI and of our own one, which `image_pipeline` writes and the fleet reads.
Knows neither of them. The service stack makes one.
"""

import jsii
from aws_cdk import aws_ec2 as ec2
from constructs import Construct

from infra.config import KitConfig
from sizing.instances import ARCHITECTURE

# Lines of AWS's Deep Learning AMI on Ubuntu 24.04 (docs.aws.amazon.com/dlami); `latest` of a PyTorch line is the latest of that line alone.
LINES = {"base": "base-oss-nvidia-driver-gpu-ubuntu-24.04", "pytorch": "oss-nvidia-driver-gpu-pytorch-2.12-ubuntu-24.04"}


def parent_parameter(config: KitConfig) -> str:
    """The public SSM parameter that names the Deep Learning AMI."""
    return f"/aws/service/deeplearning/ami/{ARCHITECTURE}/{LINES[config.image.ami_line]}/latest/ami-id"


def baked_parameter(config: KitConfig) -> str:
    """The SSM parameter that the pipeline writes. Image Builder's own role may write below /imagebuilder/, so that no role of ours need."""
    return f"/imagebuilder/{config.name}/ami-id"


@jsii.implements(ec2.IMachineImage)
class FixedImage:
    """An AMI by its id, in whatever region the stack is deployed to."""

    def __init__(self, ami_id: str) -> None:
        self._ami_id = ami_id

    def get_image(self, scope: Construct) -> ec2.MachineImageConfig:
        """See IMachineImage."""
        user_data = ec2.UserData.for_linux()
        return ec2.MachineImageConfig(image_id=self._ami_id, os_type=ec2.OperatingSystemType.LINUX, user_data=user_data)


class ServerImage(Construct):
    """machine_image; is_baked: whether the server's environment is in it."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        super().__init__(scope, id)
        image = config.image
        self.is_baked = image.kind != "dlami"
        self.machine_image: ec2.IMachineImage
        if image.kind == "ami":
            assert image.ami_id is not None, "the configuration says so"
            self.machine_image = FixedImage(image.ami_id)
        elif image.kind == "baked":
            self.machine_image = _from_parameter(baked_parameter(config))
        elif image.version == "latest":
            # Resolved at every deploy: a new AMI rolls the fleet.
            self.machine_image = _from_parameter(parent_parameter(config))
        else:
            self.machine_image = FixedImage(image.version)


def _from_parameter(name: str) -> ec2.IMachineImage:
    return ec2.MachineImage.from_ssm_parameter(name, os=ec2.OperatingSystemType.LINUX)

"""The seam between the fleet and whatever file system it shares."""

from typing import Protocol

from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from constructs import IConstruct

MOUNT_POINT = "/mnt/manylora"
SERVER_UID = 8080  # user and group of the server on every instance; what it writes belongs to them


class SharedFiles(Protocol):
    """A file system that every instance mounts at MOUNT_POINT.

    `shows_bucket`: whether the bucket's objects are files in it, at their keys; if not, instances copy what they need from the bucket."""

    shows_bucket: bool

    def mount_variables(self) -> dict[str, str]:
        """MOUNT_KIND (the type given to mount -t), MOUNT_SOURCE, MOUNT_OPTIONS and MOUNT_POINT, for user-data."""
        ...

    def grant_mount(self, role: iam.IRole) -> None:
        """Let `role` mount, read and write."""
        ...

    @property
    def resources(self) -> list[IConstruct]:
        """What holds data: kept on destroy with retain_data."""
        ...


def open_ports(network: "HasGroups", ports: list[ec2.Port], reason: str) -> None:
    """Let the fleet reach the file system on `ports`, and nobody else."""
    for port in ports:
        network.storage_security_group.add_ingress_rule(network.fleet_security_group, port, reason)
        network.fleet_security_group.add_egress_rule(network.storage_security_group, port, reason)


class HasGroups(Protocol):
    """The part of Network that `open_ports` needs."""

    storage_security_group: ec2.SecurityGroup
    fleet_security_group: ec2.SecurityGroup

"""Fsx: FSx for Lustre linked to the bucket, for fleets whose instances read many gigabytes at once. One zone; billed by capacity.

Owns the file system and its link. Knows the network's groups and the bucket; `make_shared_files` makes it.
"""

from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_fsx as fsx
from aws_cdk import aws_iam as iam
from constructs import Construct, IConstruct

from infra.config import KitConfig
from infra.network import Network
from infra.removal import data_key, data_policy
from infra.storage.base import MOUNT_POINT, open_ports
from infra.storage.bucket import Bucket

_PORTS = [ec2.Port.tcp(988), ec2.Port.tcp_range(1018, 1023)]  # Lustre's own
_EVENTS = ["NEW", "CHANGED", "DELETED"]


class Fsx(Construct):
    """See SharedFiles. file_system."""

    shows_bucket = True

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, network: Network, bucket: Bucket) -> None:
        super().__init__(scope, id)
        options, key = config.storage.fsx, data_key(self, config)
        persistent = options.deployment == "PERSISTENT_2"
        link = {} if persistent else {"import_path": f"s3://{bucket.bucket.bucket_name}", "auto_import_policy": _auto_import()}
        throughput = {"per_unit_storage_throughput": options.throughput} if persistent else {}
        self.file_system = fsx.LustreFileSystem(
            self,
            "FileSystem",
            vpc=network.vpc,
            vpc_subnet=network.vpc.select_subnets(**_selection(network.edge_subnets)).subnets[0],
            security_group=network.storage_security_group,
            storage_capacity_gib=options.capacity_gib,
            kms_key=key if persistent else None,  # scratch file systems take AWS's key alone
            lustre_configuration=fsx.LustreConfiguration(
                deployment_type=fsx.LustreDeploymentType.PERSISTENT_2 if persistent else fsx.LustreDeploymentType.SCRATCH_2,
                data_compression_type=fsx.LustreDataCompressionType.LZ4,
                **link,
                **throughput,
            ),
            removal_policy=data_policy(config),
        )
        open_ports(network, _PORTS, "shared file system")
        for port in _PORTS:  # its servers speak to each other
            network.storage_security_group.add_ingress_rule(network.storage_security_group, port, "Lustre's servers")
            network.storage_security_group.add_egress_rule(network.storage_security_group, port, "Lustre's servers")
            # ... and, where a connection is gone, to their clients.
            network.storage_security_group.add_egress_rule(network.fleet_security_group, port, "Lustre's clients")
            network.fleet_security_group.add_ingress_rule(network.storage_security_group, port, "shared file system")
        if persistent:
            self.link = fsx.CfnDataRepositoryAssociation(
                self,
                "Link",
                file_system_id=self.file_system.file_system_id,
                file_system_path="/",
                data_repository_path=f"s3://{bucket.bucket.bucket_name}/",
                batch_import_meta_data_on_create=True,  # what is in the bucket already; events tell of what comes later
                s3=fsx.CfnDataRepositoryAssociation.S3Property(
                    auto_import_policy=fsx.CfnDataRepositoryAssociation.AutoImportPolicyProperty(events=_EVENTS)
                ),
            )

    def mount_variables(self) -> dict[str, str]:
        """See SharedFiles."""
        return {
            "MOUNT_KIND": "lustre",
            "MOUNT_SOURCE": f"{self.file_system.dns_name}@tcp:/{self.file_system.mount_name}",
            "MOUNT_OPTIONS": "_netdev,relatime,flock",
            "MOUNT_POINT": MOUNT_POINT,
        }

    def grant_mount(self, role: iam.IRole) -> None:
        """Nothing to grant: Lustre knows no IAM, the security groups say who may mount."""

    @property
    def resources(self) -> list[IConstruct]:
        """See SharedFiles."""
        return [self.file_system]


def _auto_import() -> fsx.LustreAutoImportPolicy:
    return fsx.LustreAutoImportPolicy.NEW_CHANGED_DELETED


def _selection(subnets: ec2.SubnetSelection) -> dict[str, object]:
    return {"subnets": subnets.subnets} if subnets.subnets else {"subnet_type": subnets.subnet_type}

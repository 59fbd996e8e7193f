"""EFS: the default shared file system, regional, with elastic throughput. Objects of the bucket are copied to it by the instances.

Owns file system, access point and mount targets. Knows the network's groups; `make_shared_files` makes it.
"""

from aws_cdk import Token
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_efs as efs
from aws_cdk import aws_iam as iam
from constructs import Construct, IConstruct

from infra.config import KitConfig
from infra.network import Network
from infra.removal import data_key, data_policy
from infra.storage.base import MOUNT_POINT, SERVER_UID, open_ports
from infra.storage.bucket import Bucket

_TRANSITIONS = {
    0: None,
    7: efs.LifecyclePolicy.AFTER_7_DAYS,
    14: efs.LifecyclePolicy.AFTER_14_DAYS,
    30: efs.LifecyclePolicy.AFTER_30_DAYS,
    60: efs.LifecyclePolicy.AFTER_60_DAYS,
    90: efs.LifecyclePolicy.AFTER_90_DAYS,
}


class Efs(Construct):
    """See SharedFiles. file_system; access_point: the one way in, as SERVER_UID."""

    shows_bucket = False

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, network: Network, bucket: Bucket) -> None:
        super().__init__(scope, id)
        options, key = config.storage.efs, data_key(self, config)
        transition = _TRANSITIONS[options.transition_days]
        self.file_system = efs.FileSystem(
            self,
            "FileSystem",
            vpc=network.vpc,
            vpc_subnets=network.edge_subnets,
            security_group=network.storage_security_group,
            encrypted=True,
            kms_key=key,
            throughput_mode=efs.ThroughputMode.ELASTIC if options.throughput == "elastic" else efs.ThroughputMode.BURSTING,
            lifecycle_policy=transition,
            out_of_infrequent_access_policy=efs.OutOfInfrequentAccessPolicy.AFTER_1_ACCESS if transition is not None else None,
            enable_automatic_backups=config.storage.backup,
            allow_anonymous_access=False,
            removal_policy=data_policy(config),
        )
        owner = str(SERVER_UID)
        self.access_point = self.file_system.add_access_point(
            "AccessPoint",
            path="/manylora",
            create_acl=efs.Acl(owner_uid=owner, owner_gid=owner, permissions="750"),
            posix_user=efs.PosixUser(uid=owner, gid=owner),
        )
        open_ports(network, [ec2.Port.NFS], "shared file system")

    def mount_variables(self) -> dict[str, str]:
        """See SharedFiles."""
        return {
            "MOUNT_KIND": "efs",
            "MOUNT_SOURCE": f"{self.file_system.file_system_id}:/",
            "MOUNT_OPTIONS": f"_netdev,noresvport,tls,iam,accesspoint={self.access_point.access_point_id}",
            "MOUNT_POINT": MOUNT_POINT,
        }

    def grant_mount(self, role: iam.IRole) -> None:
        """Through the access point and over TLS alone."""
        role.add_to_principal_policy(
            iam.PolicyStatement(
                actions=["elasticfilesystem:ClientMount", "elasticfilesystem:ClientWrite"],
                resources=[self.file_system.file_system_arn],
                conditions={
                    "StringEquals": {"elasticfilesystem:AccessPointArn": Token.as_string(self.access_point.access_point_arn)},
                    "Bool": {"aws:SecureTransport": "true"},
                },
            )
        )

    @property
    def resources(self) -> list[IConstruct]:
        """See SharedFiles."""
        return [self.file_system]

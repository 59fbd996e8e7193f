"""S3Files: the bucket itself as a file system (NFS), so that an adapter put into the bucket is a file on every instance.

Owns file system, access point, mount targets and the role with which the service keeps files and objects the same. Knows the network's
groups and the bucket; `make_shared_files` makes it. aws-cdk-lib has no L2 for it yet.
"""

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3files as s3files
from constructs import Construct, IConstruct

from infra.acknowledge import acknowledge, nag_name
from infra.config import KitConfig
from infra.network import Network
from infra.removal import data_key, data_policy
from infra.storage.base import MOUNT_POINT, open_ports
from infra.storage.bucket import Bucket

_RULES = "DO-NOT-DELETE-S3-Files*"  # the service's own EventBridge rules: they tell it what changed in the bucket


class S3Files(Construct):
    """See SharedFiles. file_system; access_point; sync_role."""

    shows_bucket = True

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, network: Network, bucket: Bucket) -> None:
        super().__init__(scope, id)
        self._bucket, options = bucket, config.storage.s3files
        key = data_key(self, config)
        self.sync_role = self._make_sync_role(bucket)
        files = s3files.CfnFileSystem
        self.file_system = files(
            self,
            "FileSystem",
            bucket=bucket.bucket.bucket_arn,
            role_arn=self.sync_role.role_arn,
            kms_key_id=key.key_arn if key else None,
            accept_bucket_warning=True,
            synchronization_configuration=files.SynchronizationConfigurationProperty(
                import_data_rules=[
                    files.ImportDataRuleProperty(prefix="", size_less_than=options.import_below_kib * 1024, trigger="ON_FILE_ACCESS")
                ],
                expiration_data_rules=[files.ExpirationDataRuleProperty(days_after_last_access=options.expire_days)],
            ),
        )
        self.file_system.apply_removal_policy(data_policy(config))
        self.file_system.node.add_dependency(self.sync_role, bucket.bucket)
        # No identity of its own: the bucket's root belongs to root, so user-data, as root, makes the folders that the server writes.
        self.access_point = s3files.CfnAccessPoint(self, "AccessPoint", file_system_id=self.file_system.attr_file_system_id)
        subnets = network.edge_subnets.subnets or network.vpc.select_subnets(subnet_type=network.edge_subnets.subnet_type).subnets
        for index, subnet in enumerate(subnets):
            s3files.CfnMountTarget(
                self,
                f"MountTarget{index + 1}",
                file_system_id=self.file_system.attr_file_system_id,
                subnet_id=subnet.subnet_id,
                security_groups=[network.storage_security_group.security_group_id],
            )
        open_ports(network, [ec2.Port.NFS], "shared file system")

    def _make_sync_role(self, bucket: Bucket) -> iam.Role:
        """The role that the service assumes, as its documentation wants it, bound to this account and this bucket."""
        account = {"StringEquals": {"aws:ResourceAccount": cdk.Aws.ACCOUNT_ID}}
        role = iam.Role(
            self,
            "SyncRole",
            assumed_by=iam.ServicePrincipal(
                "elasticfilesystem.amazonaws.com", conditions={"StringEquals": {"aws:SourceAccount": cdk.Aws.ACCOUNT_ID}}
            ),
        )
        rules = cdk.Stack.of(self).format_arn(service="events", resource="rule", resource_name=_RULES)
        any_rule = cdk.Stack.of(self).format_arn(service="events", resource="rule", resource_name="*")
        objects = ["s3:AbortMultipartUpload", "s3:DeleteObject*", "s3:GetObject*", "s3:List*", "s3:PutObject*"]
        changing = ["DeleteRule", "DisableRule", "EnableRule", "PutRule", "PutTargets", "RemoveTargets"]
        reading = ["DescribeRule", "ListRuleNamesByTarget", "ListRules", "ListTargetsByRule"]
        for actions, resource, conditions in (
            (["s3:ListBucket", "s3:ListBucketVersions"], bucket.bucket.bucket_arn, account),
            (objects, bucket.bucket.arn_for_objects("*"), account),
            ([f"events:{name}" for name in changing], rules, {"StringEquals": {"events:ManagedBy": "elasticfilesystem.amazonaws.com"}}),
            ([f"events:{name}" for name in reading], any_rule, None),
        ):
            role.add_to_policy(iam.PolicyStatement(actions=actions, resources=[resource], conditions=conditions))
        if bucket.bucket.encryption_key:
            role.add_to_policy(
                iam.PolicyStatement(
                    actions=["kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey", "kms:DescribeKey"],
                    resources=[bucket.bucket.encryption_key.key_arn],
                )
            )
        _acknowledge_role(role, bucket, objects)
        return role

    def mount_variables(self) -> dict[str, str]:
        """See SharedFiles."""
        return {
            "MOUNT_KIND": "s3files",
            "MOUNT_SOURCE": f"{self.file_system.attr_file_system_id}:/",
            "MOUNT_OPTIONS": f"_netdev,noresvport,tls,iam,accesspoint={self.access_point.attr_access_point_id}",
            "MOUNT_POINT": MOUNT_POINT,
        }

    def grant_mount(self, role: iam.IRole) -> None:
        """Through the access point alone; large reads go straight to the bucket, which `role` may read already."""
        role.add_to_principal_policy(
            iam.PolicyStatement(
                actions=["s3files:ClientMount", "s3files:ClientWrite", "s3files:ClientRootAccess"],
                resources=[self.file_system.attr_file_system_arn],
                conditions={"StringEquals": {"s3files:AccessPointArn": self.access_point.attr_access_point_arn}},
            )
        )

    @property
    def resources(self) -> list[IConstruct]:
        """See SharedFiles."""
        return [self.file_system]


def _acknowledge_role(role: iam.Role, bucket: Bucket, objects: list[str]) -> None:
    """nag's findings on what S3 Files asks of its role."""
    rule = "arn:<AWS::Partition>:events:<AWS::Region>:<AWS::AccountId>:rule/"
    objects_arn = f"{nag_name(role, bucket, bucket.bucket.bucket_arn)}/*"
    wanted = "as the documentation of S3 Files asks; on this bucket's objects alone"
    reasons = {f"IAM5[Action::{action}]": wanted for action in objects if action.endswith("*")}
    reasons |= {
        f"IAM5[Resource::{objects_arn}]": "the file system is the whole bucket",
        f"IAM5[Resource::{rule}{_RULES}]": "the service's own rules, whose names it chooses; only those that it manages",
        f"IAM5[Resource::{rule}*]": "reads rules to find its own",
    }
    acknowledge(role, reasons)

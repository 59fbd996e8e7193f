"""What is left when a stack goes, and under which key: the one place that turns `retain_data` and `kms_key_arn` into CDK's objects."""

from aws_cdk import RemovalPolicy
from aws_cdk import aws_kms as kms
from constructs import Construct

from infra.config import KitConfig


def data_policy(config: KitConfig) -> RemovalPolicy:
    """For the bucket and the file system: kept with `retain_data`, gone without."""
    return RemovalPolicy.RETAIN if config.retain_data else RemovalPolicy.DESTROY


def data_key(scope: Construct, config: KitConfig) -> kms.IKey | None:
    """The customer's key, or None for AWS's own."""
    if config.kms_key_arn is None:
        return None
    return scope.node.try_find_child("DataKey") or kms.Key.from_key_arn(scope, "DataKey", config.kms_key_arn)

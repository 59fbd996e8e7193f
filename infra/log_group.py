"""Log groups as every construct makes them: kept for observability.log_days, encrypted with the deployer's key if there is one, gone with
the stack (retain_data is about models and adapters)."""

import aws_cdk as cdk
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.config import KitConfig
from infra.removal import data_key


def make_log_group(scope: Construct, id: str, *, config: KitConfig, name: str | None = None) -> logs.LogGroup:
    """A group below `scope`. `name`: only where the service that writes chooses it; else CloudFormation's."""
    group = logs.LogGroup(scope, id, log_group_name=name, encryption_key=data_key(scope, config), removal_policy=cdk.RemovalPolicy.DESTROY)
    group.node.default_child.retention_in_days = config.observability.log_days  # the L2's enum names the days in words
    return group

"""The instances' role: what each statement is for, and why some of them name no resource.

Owns the statements that are the fleet's own; bucket, file system, model and archive add theirs by their `grant_` methods. `fleet` makes it.
"""

from typing import cast

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.acknowledge import acknowledge
from infra.boot_phases import NAMESPACE
from infra.config import KitConfig
from infra.removal import data_key

# What Session Manager needs (AmazonSSMManagedInstanceCore without its parameter reading); none of these knows resources.
SESSION_ACTIONS = {
    "ssm": ("UpdateInstanceInformation", "ListAssociations", "ListInstanceAssociations", "DescribeAssociation", "GetDocument",
            "DescribeDocument", "GetDeployablePatchSnapshotForInstance", "PutInventory", "PutComplianceItems",
            "UpdateAssociationStatus", "UpdateInstanceAssociationStatus"),
    "ssmmessages": ("CreateControlChannel", "CreateDataChannel", "OpenControlChannel", "OpenDataChannel"),
    "ec2messages": ("AcknowledgeMessage", "DeleteMessage", "FailMessage", "GetEndpoint", "GetMessages", "SendReply"),
}  # fmt: skip
_REASONS = {
    "IAM5[Resource::*]": "the service demands it: Session Manager's calls, DescribeAutoScalingInstances, DescribeTags and X-Ray know no "
    "resources; PutMetricData is bound to the product's namespace by a condition",
}


def make_fleet_role(scope: Construct, id: str, *, config: KitConfig, log_groups: list[logs.LogGroup]) -> iam.Role:
    """The role of every instance of the stack's group."""
    role = iam.Role(scope, id, assumed_by=iam.ServicePrincipal("ec2.amazonaws.com"), description=f"{config.name}: instances")
    for service, actions in SESSION_ACTIONS.items():
        role.add_to_policy(iam.PolicyStatement(actions=[f"{service}:{action}" for action in actions], resources=["*"]))
    role.add_to_policy(
        iam.PolicyStatement(
            actions=["cloudwatch:PutMetricData"],
            resources=["*"],
            conditions={"StringEquals": {"cloudwatch:namespace": NAMESPACE}},
        )
    )
    role.add_to_policy(
        iam.PolicyStatement(
            actions=["logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
            resources=[group.log_group_arn for group in log_groups],
        )
    )
    _add_group_statements(role)
    if config.model.hub_secret_arn:
        secret = iam.PolicyStatement(actions=["secretsmanager:GetSecretValue"], resources=[config.model.hub_secret_arn])
        role.add_to_policy(secret)
    if config.observability.tracing == "xray":
        role.add_to_policy(iam.PolicyStatement(actions=["xray:PutTraceSegments", "xray:PutTelemetryRecords"], resources=["*"]))
    if key := data_key(scope, config):
        key.grant_decrypt(role)
    stack = cdk.Stack.of(scope)
    region, account = "<AWS::Region>", "<AWS::AccountId>"
    groups = f"arn:<AWS::Partition>:autoscaling:{region}:{account}:autoScalingGroup:*:autoScalingGroupName/{stack.stack_name}-*"
    log_ids = [stack.get_logical_id(cast(cdk.CfnElement, group.node.default_child)) for group in log_groups]
    logs_reasons = {f"IAM5[Resource::<{log_id}.Arn>]": "streams of this group" for log_id in log_ids}
    acknowledge(role, _REASONS | {f"IAM5[Resource::{groups}]": "the group of this stack; its random part is not known"} | logs_reasons)
    return role


def _add_group_statements(role: iam.Role) -> None:
    """What an instance may do about its own group. The group is named by the stack: its own name would make a circle of references."""
    stack = cdk.Stack.of(role)
    own_group = stack.format_arn(
        service="autoscaling",
        resource="autoScalingGroup",
        resource_name=f"*:autoScalingGroupName/{stack.stack_name}-*",
        arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME,
    )
    role.add_to_policy(
        iam.PolicyStatement(
            actions=["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat", "autoscaling:SetInstanceHealth"],
            resources=[own_group],
        )
    )
    describing = iam.PolicyStatement(actions=["autoscaling:DescribeAutoScalingInstances", "ec2:DescribeTags"], resources=["*"])
    role.add_to_policy(describing)
    role.add_to_policy(iam.PolicyStatement(actions=["cloudformation:SignalResource"], resources=[stack.stack_id]))

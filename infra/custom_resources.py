"""Bounds the Lambda functions that aws-cdk-lib adds by itself (emptying a bucket on destroy): a log group of the stack, a policy of ours.

As they come, they log to a group that no stack owns, which would outlive `cdk destroy`, under a managed policy. `stacks` calls it last.
"""

import aws_cdk as cdk
from aws_cdk import aws_iam as iam

from infra.config import KitConfig
from infra.log_group import make_log_group

_SUFFIX = "CustomResourceProvider"


def bound_providers(stack: cdk.Stack, config: KitConfig) -> None:
    """Give every such function of `stack` its log group, and its role the right to write there and nothing more."""
    for provider in stack.node.children:
        if not provider.node.id.endswith(_SUFFIX):
            continue
        function, role = (provider.node.find_child(part) for part in ("Handler", "Role"))
        assert isinstance(function, cdk.CfnResource) and isinstance(role, cdk.CfnResource)
        name = provider.node.id.replace("::", "")
        group = make_log_group(stack, f"{name}LogGroup", config=config)
        writing = iam.PolicyStatement(actions=["logs:CreateLogStream", "logs:PutLogEvents"], resources=[group.log_group_arn])
        policy = iam.CfnPolicy(
            stack,
            f"{name}LogPolicy",
            policy_name="Logs",
            policy_document=iam.PolicyDocument(statements=[writing]),
            roles=[role.ref],
        )
        role.add_property_deletion_override("ManagedPolicyArns")
        function.add_property_override("LoggingConfig", {"LogGroup": group.log_group_name})
        function.add_resource_dependency(policy)

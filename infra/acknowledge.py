"""One way to write down why a finding of cdk-nag stays, beside the construct that has it. Any construct may call it."""

import aws_cdk as cdk
from constructs import IConstruct


def acknowledge(construct: IConstruct, reasons: dict[str, str]) -> None:
    """Acknowledge findings on `construct` and what it is made of: {rule without the pack, as "IAM5[Resource::*]": reason}."""
    cdk.Validations.of(construct).acknowledge(
        *(cdk.Acknowledgment(id=f"AwsSolutions::AwsSolutions-{finding}", reason=reason) for finding, reason in reasons.items())
    )


def nag_name(scope: IConstruct, owner: IConstruct, arn: str) -> str:
    """How cdk-nag writes the ARN of a resource of `owner` in a finding on `scope`: another for a resource of another stack."""
    here, there = cdk.Stack.of(scope), cdk.Stack.of(owner)
    if here.node.path != there.node.path:
        return here.resolve(there.export_value(arn))["Fn::ImportValue"]  # the export that the reference becomes
    resource, attribute = here.resolve(arn)["Fn::GetAtt"]
    return f"<{resource}.{attribute}>"

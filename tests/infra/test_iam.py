"""Every statement of every policy: no action with a wildcard, `*` as a resource only where the service knows no other."""

import json

import pytest

from tests.infra.conftest import resources

CONFIGURATIONS = [
    {},
    {"storage.kind": "s3files", "endpoint.auth": "iam"},
    {"storage.kind": "fsx", "endpoint.auth": "jwt", "observability.tracing": "xray"},
    {"image.kind": "baked", "network.nat": "none", "model.source": "bucket", "model.id": "m"},
    {"image.kind": "dlami", "endpoint.waf": True, "fleet.min": 0, "fleet.scale_to_zero": True},
]
# Actions that know no resource, by the service authorization reference; each with what bounds it instead.
WITHOUT_RESOURCE = {
    "ssmmessages:CreateControlChannel": "Session Manager: the instance's own channel",
    "ssmmessages:CreateDataChannel": "Session Manager: the instance's own channel",
    "ssmmessages:OpenControlChannel": "Session Manager: the instance's own channel",
    "ssmmessages:OpenDataChannel": "Session Manager: the instance's own channel",
    "ec2messages:AcknowledgeMessage": "Run Command: the instance's own messages",
    "ec2messages:DeleteMessage": "Run Command: the instance's own messages",
    "ec2messages:FailMessage": "Run Command: the instance's own messages",
    "ec2messages:GetEndpoint": "Run Command: the instance's own messages",
    "ec2messages:GetMessages": "Run Command: the instance's own messages",
    "ec2messages:SendReply": "Run Command: the instance's own messages",
    **dict.fromkeys(
        [
            "ssm:DescribeAssociation",
            "ssm:DescribeDocument",
            "ssm:GetDeployablePatchSnapshotForInstance",
            "ssm:GetDocument",
            "ssm:ListAssociations",
            "ssm:ListInstanceAssociations",
            "ssm:PutComplianceItems",
            "ssm:PutInventory",
            "ssm:UpdateAssociationStatus",
            "ssm:UpdateInstanceAssociationStatus",
            "ssm:UpdateInstanceInformation",
        ],
        "Systems Manager's agent, as in AmazonSSMManagedInstanceCore: documents and associations are AWS's own, their names not known",
    ),
    **dict.fromkeys(["ssm:ListCommands", "ssm:ListCommandInvocations", "ssm:DescribeInstanceInformation"], "reads, knows no resource"),
    "cloudwatch:PutMetricData": "bounded by the condition on the namespace",
    "autoscaling:DescribeAutoScalingInstances": "reads, knows no resource",
    "autoscaling:DescribeAutoScalingGroups": "reads, knows no resource",
    "autoscaling:DescribeLifecycleHooks": "reads, knows no resource",
    "ec2:DescribeTags": "reads, knows no resource",
    "ec2:DescribeInstances": "reads, knows no resource",
    "ec2:DescribeVolumes": "reads, knows no resource",
    "ec2:DescribeAvailabilityZones": "reads, knows no resource",
    "xray:PutTraceSegments": "knows no resource",
    "xray:PutTelemetryRecords": "knows no resource",
    "xray:GetSamplingRules": "knows no resource",
    "xray:GetSamplingTargets": "knows no resource",
}
# Wildcards that a service's documentation asks for, on the resource that they are bound to.
WILDCARDS = {"s3:DeleteObject*", "s3:GetObject*", "s3:List*", "s3:PutObject*"}  # S3 Files' own role, on this bucket alone
# What aws-cdk-lib's function that empties a bucket on destroy is granted by the bucket's own policy.
EMPTYING = {"s3:PutBucketPolicy", "s3:GetBucket*", "s3:List*", "s3:DeleteObject*"}


def listed(value):
    return value if isinstance(value, list) else [value]


def statements(template):
    """(resource's id, statement, whether it says what an identity may do) of every policy in a template."""
    for name, item in template.get("Resources", {}).items():
        properties = item.get("Properties", {})
        inline = properties.get("Policies", []) if item["Type"] == "AWS::IAM::Role" else []
        documents = [properties.get("PolicyDocument"), *(policy["PolicyDocument"] for policy in inline)]
        for document in documents:
            if isinstance(document, dict):
                for statement in listed(document["Statement"]):
                    yield name, statement, "Principal" not in statement


@pytest.mark.parametrize("overrides", CONFIGURATIONS, ids=str)
def test_no_statement_allows_more_than_it_must(synth, overrides):
    seen = 0
    for part, template in synth(overrides).items():
        for name, statement, is_identity in statements(template):
            if statement["Effect"] == "Deny":
                continue
            seen += 1
            where = f"{part}/{name}: {json.dumps(statement)}"
            assert "NotAction" not in statement and "NotResource" not in statement, where
            for action in listed(statement["Action"]):
                allowed = WILDCARDS if is_identity and "SyncRole" in name else EMPTYING if not is_identity else set()
                assert "*" not in action or action in allowed, where
                if is_identity and "*" in listed(statement["Resource"]):
                    assert action in WITHOUT_RESOURCE, f"{action} on every resource; {where}"
                if action == "cloudwatch:PutMetricData":
                    assert "cloudwatch:namespace" in json.dumps(statement.get("Condition", {})), where
            assert statement.get("Principal") not in ("*", {"AWS": "*"}) or "Condition" in statement, where
    assert seen > 10


# Policies of AWS that stay, as services want them.
OF_AWS = {
    "service-role/AmazonAPIGatewayPushToCloudWatchLogs": "the account-wide role for logs: groups of the service's choice, for every API",
    "service-role/EC2ImageBuilderLifecycleExecutionPolicy": "removes old images: those that Image Builder made, by its tag",
}


@pytest.mark.parametrize("overrides", CONFIGURATIONS[:4], ids=str)
def test_no_role_has_a_policy_of_aws_that_we_do_not_write(synth, overrides):
    for part, template in synth(overrides).items():
        for name, role in resources(template, "AWS::IAM::Role").items():
            policies = [json.dumps(policy) for policy in role["Properties"].get("ManagedPolicyArns", [])]
            assert all(any(name in policy for name in OF_AWS) for policy in policies), f"{part}/{name}: {policies}"


def test_the_boundary_is_on_every_role(synth):
    boundary = "arn:aws:iam::111122223333:policy/boundary"
    for template in synth({"permissions_boundary": boundary, "endpoint.auth": "jwt"}).values():
        for name, role in resources(template, "AWS::IAM::Role").items():
            assert role["Properties"].get("PermissionsBoundary") == boundary, name

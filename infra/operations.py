"""Operations: what an operator does to a running fleet through Systems Manager, without a shell on an instance.

Owns three documents: one that collects diagnostics, one that puts another server onto an instance, and one that rolls it over the fleet, an
instance after another. Their scripts are in `documents/`. Patching of a plain image is `patching`'s. The service stack makes one.
"""

from pathlib import Path
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_ssm as ssm
from constructs import Construct

from infra.acknowledge import acknowledge, nag_name
from infra.config import KitConfig
from infra.fleet import LAUNCH_S, GpuFleet
from infra.load_balancer import ENTER_S, LEAVE_S
from infra.patching import Patching
from infra.storage import Bucket

RELEASES, DIAGNOSTICS = "releases/", "diagnostics/"  # prefixes of the bucket
_SCRIPTS = Path(__file__).parent / "documents"
_GROUP_TAG = "aws:autoscaling:groupName"
_UPDATE_S = 7200  # a drain, packages, a model's load


class Operations(Construct):
    """`diagnostics`, `update` (command documents), `roll` (an automation), `patching` (None where the image is not the plain one)."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, fleet: GpuFleet, bucket: Bucket) -> None:
        super().__init__(scope, id)
        self._config, self._fleet, self._bucket = config, fleet, bucket.bucket
        self._group_name = fleet.group.auto_scaling_group_name
        self.diagnostics = self._make_diagnostics()
        self.update = self._make_update()
        self.roll = self._make_roll()
        self._grant()
        self.patching = Patching(self, "Patching", config=config, group=fleet.group) if config.image.kind == "dlami" else None
        self._add_outputs()

    def _make_diagnostics(self) -> ssm.CfnDocument:
        target = f"s3://{self._bucket.bucket_name}/{DIAGNOSTICS}"
        content = _command("Collects logs and states of an instance into the bucket", {"TARGET_URI": target}, "collect-diagnostics.sh", 300)
        return ssm.CfnDocument(self, "Diagnostics", document_type="Command", content=content)

    def _make_update(self) -> ssm.CfnDocument:
        wheels = self._config.image.wheelhouse_prefix
        variables = {
            "ARTIFACT_URI": "{{ ArtifactUri }}",
            "WHEELHOUSE_URI": f"s3://{self._bucket.bucket_name}/{wheels}" if wheels else "",
            # Well below the time that the agent gives a server that starts (user-data's READY_S): the way back is the script's affair.
            "ANSWER_S": str((self._fleet.grace_s - LAUNCH_S) * 2 // 3),
            "LEAVE_S": str(LEAVE_S),
            "ENTER_S": str(ENTER_S),
        }
        content = _command("Puts another release of the server onto an instance", variables, "update-server.sh", _UPDATE_S)
        return ssm.CfnDocument(self, "Update", document_type="Command", content=content | {"parameters": _ARTIFACT})

    def _make_roll(self) -> ssm.CfnDocument:
        """No instance is replaced under the script's hands, which goes back to the old release by itself. Whatever comes of it, the group
        replaces again afterwards, and the automation's status is that of the roll."""
        group = {"Service": "autoscaling", "AutoScalingGroupName": self._group_name, "ScalingProcesses": ["ReplaceUnhealthy"]}
        run = {
            "DocumentName": self.update.ref,
            "Targets": [{"Key": f"tag:{_GROUP_TAG}", "Values": [self._group_name]}],
            "Parameters": {"ArtifactUri": ["{{ ArtifactUri }}"]},
            "MaxConcurrency": "1",
            "MaxErrors": "0",
        }
        steps = [
            {"name": "suspend", "action": "aws:executeAwsApi", "inputs": group | {"Api": "SuspendProcesses"}},
            {
                "name": "roll",
                "action": "aws:runCommand",
                "timeoutSeconds": 24 * 3600,
                "isCritical": True,
                "onFailure": "step:resume",
                "onCancel": "step:resume",
                "inputs": run,
            },
            {"name": "resume", "action": "aws:executeAwsApi", "inputs": group | {"Api": "ResumeProcesses"}, "isEnd": True},
        ]
        content = {
            "schemaVersion": "0.3",
            "description": "Rolls another release of the server over the fleet, one instance after another; stops at the first that fails",
            "assumeRole": self._make_roll_role().role_arn,
            "parameters": _ARTIFACT,
            "mainSteps": steps,
        }
        return ssm.CfnDocument(self, "Roll", document_type="Automation", content=content)

    def _make_roll_role(self) -> iam.Role:
        stack, mine = cdk.Stack.of(self), {"StringEquals": {"aws:SourceAccount": cdk.Aws.ACCOUNT_ID}}
        role = iam.Role(self, "RollRole", assumed_by=iam.ServicePrincipal("ssm.amazonaws.com", conditions=mine))
        group_arn = stack.format_arn(
            service="autoscaling",
            resource="autoScalingGroup",
            resource_name=f"*:autoScalingGroupName/{self._group_name}",
            arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME,
        )
        instances = stack.format_arn(service="ec2", resource="instance", resource_name="*")
        document = stack.format_arn(service="ssm", resource="document", resource_name=self.update.ref)
        for actions, resources, conditions in (
            (("autoscaling:SuspendProcesses", "autoscaling:ResumeProcesses"), [group_arn], None),
            (("ssm:SendCommand",), [document], None),
            (("ssm:SendCommand",), [instances], {"StringEquals": {f"ssm:resourceTag/{_GROUP_TAG}": self._group_name}}),
            (("ssm:ListCommands", "ssm:ListCommandInvocations", "ssm:DescribeInstanceInformation"), ["*"], None),
        ):
            role.add_to_policy(iam.PolicyStatement(actions=list(actions), resources=resources, conditions=conditions))
        account = "<AWS::Region>:<AWS::AccountId>"
        group_id = stack.resolve(self._group_name)["Ref"]
        reasons = {
            "IAM5[Resource::*]": "the service demands it: these calls only list commands and instances, and know no resources",
            f"IAM5[Resource::arn:<AWS::Partition>:ec2:{account}:instance/*]": "bound to the group's instances by a condition on their tag",
            f"IAM5[Resource::arn:<AWS::Partition>:autoscaling:{account}:autoScalingGroup:*:autoScalingGroupName/<{group_id}>]": (
                "this one group; an ARN of a group has a random part before its name"
            ),
        }
        acknowledge(role, reasons)
        return role

    def _grant(self) -> None:
        """Instances may fetch releases and leave diagnostics; one cannot read what another left."""
        bucket, policy = self._bucket, self._fleet.role.add_to_principal_policy
        policy(iam.PolicyStatement(actions=["s3:GetObject"], resources=[bucket.arn_for_objects(f"{RELEASES}*")]))
        policy(iam.PolicyStatement(actions=["s3:PutObject"], resources=[bucket.arn_for_objects(f"{DIAGNOSTICS}*")]))
        if bucket.encryption_key:
            policy(iam.PolicyStatement(actions=["kms:GenerateDataKey"], resources=[bucket.encryption_key.key_arn]))
        name = nag_name(self._fleet.role, bucket, bucket.bucket_arn)
        reasons = {RELEASES: "reads whatever release lies here", DIAGNOSTICS: "writes archives named by instance and time"}
        acknowledge(self._fleet.role, {f"IAM5[Resource::{name}/{prefix}*]": reason for prefix, reason in reasons.items()})

    def _add_outputs(self) -> None:
        stack = cdk.Stack.of(self)
        uri = f"s3://BUCKET/{RELEASES}FILE.zip"  # BUCKET: the data stack's output
        roll = f"aws ssm start-automation-execution --document-name {self.roll.ref} --parameters ArtifactUri={uri}"
        target = f"Key=tag:{_GROUP_TAG},Values={self._group_name}"
        collect = f"aws ssm send-command --document-name {self.diagnostics.ref} --targets {target}"
        cdk.CfnOutput(stack, "RollCommand", value=roll)
        cdk.CfnOutput(stack, "DiagnosticsCommand", value=collect)


_ARTIFACT: dict[str, Any] = {
    "ArtifactUri": {
        "type": "String",
        "description": f"Archive of the server, put below {RELEASES} of the bucket (`cdk synth` leaves it in .cache/artifact/)",
        # The value ends up in a shell's line.
        "allowedPattern": rf"^s3://[a-z0-9.-]{{3,63}}/{RELEASES}[A-Za-z0-9._-]{{1,128}}\.zip$",
    }
}


def _command(description: str, variables: dict[str, str], script: str, timeout_s: int) -> dict[str, Any]:
    """A command document: `variables`, then the script."""
    lines = [f"export {name}='{value}'" for name, value in variables.items()]
    lines += (_SCRIPTS / script).read_text(encoding="utf-8").splitlines()[1:]  # the shell is named below
    inputs = {"timeoutSeconds": str(timeout_s), "runCommand": ["#!/bin/bash", *lines]}
    step = {"action": "aws:runShellScript", "name": "run", "precondition": {"StringEquals": ["platformType", "Linux"]}, "inputs": inputs}
    return {"schemaVersion": "2.2", "description": description, "mainSteps": [step]}

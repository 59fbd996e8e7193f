"""Step 4, second half: a deploy without changes, one that is refused in the middle, one that changes, one with a bad parameter."""

from infra.fleet import GROUP_ID
from rehearse.cdk import CdkFailed
from rehearse.errors import Differs, check
from rehearse.rehearsal import Rehearsal

CHANGES = {"fleet__max": "4", "fleet__drain_s": "600"}
MISSING = "/nobody/has/this/parameter"


def deploy_again(rehearsal: Rehearsal) -> None:
    """Four deploys; what is deployed at the end is `changed`."""
    report, cdk = rehearsal.report, rehearsal.cdk
    report.begin(4, "deploys after the first")
    (service,) = [name for name in cdk.outputs if name.endswith("-service")]
    with report.line("again, without a change: CloudFormation sees none") as line:
        output = cdk.deploy(into="again")
        stacks = [name for name in cdk.outputs if f"{name} (no changes)" in output]
        check(len(stacks) == 2, f"not without changes: {output[-1500:]}")
        line.detail = ", ".join(stacks)
    before = _state(rehearsal, service)
    with report.line("a changed configuration that is refused on the way: rolled back, non-zero exit, the resource named") as line:
        (rehearsal.emulator.state / "refuse").write_text("AWS::AutoScaling::AutoScalingGroup")
        error = _fail(rehearsal, into="changed", **CHANGES)
        check(GROUP_ID in error.output and "refused by the rehearsal" in error.output, f"not named: {error.output[-1500:]}")
        after = _state(rehearsal, service)
        check(after == before | {"status": "UPDATE_ROLLBACK_COMPLETE"}, f"not as before: {after}, {before}")
        line.detail = f"exit {error.status}; {service}: {after['status']}, size and user-data as before"
    with report.line("the same configuration, accepted: the group and its launch template change") as line:
        cdk.deploy(again="changed")
        after = _state(rehearsal, service)
        check(after["status"] == "UPDATE_COMPLETE" and after["max"] == 4, f"{after}")
        check("MANYLORA_DRAIN_TIMEOUT_S='600'" in after["user_data"], "user-data has not changed")
        line.detail = f"max {before['max']} -> 4, drain 900 s -> 600 s in version {after['version']} of the template"
    with report.line("a bad parameter (an AMI that is not there): non-zero exit, named, nothing changed") as line:
        (parameter,) = [
            name for name, item in cdk.template("changed", service)["Parameters"].items() if item["Type"].endswith("<AWS::EC2::Image::Id>")
        ]
        error = _fail(rehearsal, again="changed", parameters={f"{service}:{parameter}": MISSING})
        check(MISSING in error.output, f"not named: {error.output[-1500:]}")
        check(_state(rehearsal, service) == after, "something changed")
        line.detail = f"exit {error.status}; {next(text for text in error.output.splitlines() if MISSING in text).strip()[:140]}"


def _fail(rehearsal: Rehearsal, **how: object) -> CdkFailed:
    try:
        rehearsal.cdk.deploy(**how)  # type: ignore[arg-type]
    except CdkFailed as error:
        return error
    raise Differs("the deploy went through")


def _state(rehearsal: Rehearsal, stack: str) -> dict:
    """What a rollback must bring back."""
    client = rehearsal.emulator.client
    (group,) = client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    status = client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]
    return {
        "status": status,
        "max": group["MaxSize"],
        "version": group["LaunchTemplate"]["Version"],
        "user_data": rehearsal.group.user_data(),
    }

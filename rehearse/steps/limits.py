"""Step 6: what cannot be proven here. Each line checks that it really cannot: where the emulator learns it, the line fails and is raised.

Runs before the destroy, while there is something to ask.
"""

import socket

from rehearse.emulator.names import TIMEOUT_S
from rehearse.errors import Differs, check
from rehearse.rehearsal import Rehearsal

_NUM_BEYOND = 1000  # instances: no account has the quota, no region the capacity


def mark(rehearsal: Rehearsal) -> None:
    """The limits of the rehearsal."""
    report = rehearsal.report
    report.begin(6, "what only an account can show (docs/first-real-deploy.md)")
    for what, check_that_it_cannot in _LIMITS.items():
        with report.limit(what) as line:
            line.detail = check_that_it_cannot(rehearsal)


def _auto_scaling(rehearsal: Rehearsal) -> str:
    emulator = rehearsal.emulator
    reservations = emulator.client("ec2").describe_instances()["Reservations"]
    check(not reservations, f"the emulator has launched {len(reservations)} instances by itself")
    reasons = _signal_events(rehearsal)
    check(not reasons, f"the emulator waits for signals: {reasons}")
    return "the emulator launches nothing and waits for no signal; rehearse/group.py, ours, launches, watches and drains in its place"


def _signal_events(rehearsal: Rehearsal) -> list[str]:
    """Reasons of the group's events that speak of signals, as CloudFormation's "Received SUCCESS signal" does."""
    (stack,) = [name for name in rehearsal.cdk.outputs if name.endswith("-service")]
    events = rehearsal.emulator.client("cloudformation").describe_stack_events(StackName=stack)["StackEvents"]
    return [item["ResourceStatusReason"] for item in events if "signal" in item.get("ResourceStatusReason", "").lower()]


def _iam(rehearsal: Rehearsal) -> str:
    client = rehearsal.emulator.client("iam")
    client.create_user(UserName="nobody")
    try:
        key = client.create_access_key(UserName="nobody")["AccessKey"]
        caller = rehearsal.emulator.client("s3", key["AccessKeyId"], key["SecretAccessKey"])
        names = [item["Name"] for item in caller.list_buckets()["Buckets"]]
        client.delete_access_key(UserName="nobody", AccessKeyId=key["AccessKeyId"])
    finally:
        client.delete_user(UserName="nobody")
    check(names, "a user without any right is refused")
    return "a user without any right lists the buckets; tests/infra/test_iam.py reads the policies, cdk-nag too"


def _gpu(rehearsal: Rehearsal) -> str:
    devices = {line for item in rehearsal.group.instances.values() for line in item.recorded("server.env") if "MANYLORA_DEVICE" in line}
    check(devices == {'MANYLORA_DEVICE="cpu"'}, f"the instances ran on {devices}")
    return 'the instances ran with MANYLORA_DEVICE="cpu"; nor is the AMI, its driver or its mounts here'


def _capacity(rehearsal: Rehearsal) -> str:
    client, name = rehearsal.emulator.client("autoscaling"), rehearsal.group.name
    size = client.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"][0]
    before = {"MaxSize": size["MaxSize"], "DesiredCapacity": size["DesiredCapacity"]}
    try:
        client.update_auto_scaling_group(AutoScalingGroupName=name, MaxSize=_NUM_BEYOND, DesiredCapacity=_NUM_BEYOND)
        members = client.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"][0]["Instances"]
    finally:
        client.update_auto_scaling_group(AutoScalingGroupName=name, **before)
    check(len(members) == _NUM_BEYOND, f"the emulator gives {len(members)} of {_NUM_BEYOND} instances")
    return f"{_NUM_BEYOND} g6.xlarge at once are granted; python -m infra.readiness asks an account for its quota and zones"


def _efs(rehearsal: Rehearsal) -> str:
    (file_system,) = rehearsal.emulator.client("efs").describe_file_systems()["FileSystems"]
    name = f"{file_system['FileSystemId']}.efs.{rehearsal.emulator.client('efs').meta.region_name}.amazonaws.com"
    try:
        found = socket.gethostbyname(name)
    except OSError:
        return f"{name} has no address; nor are TLS, IAM and the access point of the mount tried"
    raise Differs(f"{name} is {found}")


def _streaming(rehearsal: Rehearsal) -> str:
    first_s, whole_s = rehearsal.endpoint.first_and_last("Count: 1, 2, 3,", max_new_tokens=32, ignore_eos_token=True)
    check(whole_s - first_s < whole_s / 4, f"the first part came after {first_s:.2f} s of {whole_s:.2f} s: the emulator streams")
    modes = _integrations(rehearsal, "ResponseTransferMode")
    check("STREAM" in modes, f"the template's transfer modes are {modes}")
    return f"all {whole_s:.1f} s of a streamed answer came at once; the template asks for {modes.count('STREAM')} streamed methods"


def _time_limits(rehearsal: Rehearsal) -> str:
    timeouts = _integrations(rehearsal, "TimeoutInMillis")
    check(set(timeouts) == {29_000, 900_000} and TIMEOUT_S * 1000 not in timeouts, f"timeouts {timeouts}, {TIMEOUT_S:.0f} s here")
    num_long, num_short = timeouts.count(900_000), timeouts.count(29_000)
    return f"the template has {num_long} methods with 900 s and {num_short} with 29 s; all end after {TIMEOUT_S:.0f} s here"


def _integrations(rehearsal: Rehearsal, key: str) -> list:
    (stack,) = [name for name in rehearsal.cdk.outputs if name.endswith("-service")]
    resources = rehearsal.cdk.template("dev", stack)["Resources"].values()
    found = [item["Properties"]["Integration"].get(key) for item in resources if item["Type"] == "AWS::ApiGateway::Method"]
    return [item for item in found if item is not None]


_LIMITS = {
    "Auto Scaling and CloudFormation act on health, hook, policy and signal": _auto_scaling,
    "IAM lets each part do what it needs, and no more": _iam,
    "the GPU, the AMI": _gpu,
    "capacity and quota": _capacity,
    "EFS: its name, its mount": _efs,
    "the gateway streams": _streaming,
    "the gateway's time limits": _time_limits,
}

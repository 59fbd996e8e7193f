"""Step 2: the deployed user-data, booted as two instances on one shared file system; what the template says about them."""

import json
from typing import Any

from rehearse.errors import check
from rehearse.group import SIGNAL_RESOURCE, Group
from rehearse.instance import Instance
from rehearse.rehearsal import Rehearsal
from rehearse.shared_files import kind_of_file_system

BOOT_STEPS = ["artifact", "install", "mount", "agent", "model", "ready"]


def boot(rehearsal: Rehearsal) -> None:
    """Two instances, at the same time; they serve when this ends."""
    report = rehearsal.report
    how = "in namespaces of their own" if rehearsal.refused is None else f"WITHOUT namespaces, paths rewritten: {rehearsal.refused}"
    report.begin(2, f"two instances from the deployed launch template, {how}")
    rehearsal.enter_group(Group(rehearsal.emulator, rehearsal.folder, shared=rehearsal.shared, has_namespaces=rehearsal.refused is None))
    group = rehearsal.group
    with report.line("the template has the rolling update, the wait for signals and both hooks") as line:
        line.detail = check_template(rehearsal)
    with report.line("user-data boots two instances from the uploaded archive to /health") as line:
        made = group.launch(2)
        for instance in made:
            check(list(instance.boot_seconds()) == BOOT_STEPS, f"{instance.id} booted by {instance.boot_seconds()}")
        longest_s = max(sum(item.boot_seconds().values()) for item in made)
        line.detail = f"{how}; changed: MANYLORA_DEVICE, MANYLORA_NUM_THREADS; ready after {longest_s:.0f} s"
    with report.line("each signals success once, to the resource that waits, when /health answers 200") as line:
        for instance in made:
            check_signal(instance)
        line.detail = f"{SIGNAL_RESOURCE}; the AWS CLI is a stand-in that records the call"
    with report.line("both mount one file system: one copy of the base model for the fleet") as line:
        mounts = [instance.recorded("mount") for instance in made]
        fstab = {entry for instance in made for entry in instance.recorded("fstab") if " /mnt/manylora " in entry}
        check(all(len(item) == 1 for item in mounts) and len(fstab) == 1, f"mounted {mounts}, fstab {fstab}")
        entry = fstab.pop()
        file_system, access_point = efs_ids(rehearsal)
        check(entry.startswith(f"{file_system}:/ ") and f"accesspoint={access_point}" in entry and ",tls,iam," in entry, entry)
        models = list((rehearsal.shared / "base" / "models").iterdir())
        check(len(models) == 1, f"the shared file system holds {models}")
        where = "bound in" if rehearsal.refused is None else "a link"
        line.detail = f"in EFS's place, {where}: {kind_of_file_system(rehearsal.shared)}; fstab: {entry}"
    with report.line("the load balancer has both, and nobody else") as line:
        check(group.targets() == {item.id for item in made}, f"targets {group.targets()}")
        line.detail = "registered by rehearse/group.py, ours, in place of Auto Scaling"


def check_template(rehearsal: Rehearsal) -> str:
    """Of the deployed service stack: the group's policies and hook."""
    (stack,) = [name for name in rehearsal.cdk.outputs if name.endswith("-service")]
    body = rehearsal.emulator.client("cloudformation").get_template(StackName=stack)["TemplateBody"]
    resources: dict[str, Any] = (json.loads(body) if isinstance(body, str) else body)["Resources"]
    group = resources[SIGNAL_RESOURCE]
    update = group["UpdatePolicy"]["AutoScalingRollingUpdate"]
    check(update["WaitOnResourceSignals"] is True and update["MaxBatchSize"] == 1, f"update policy {update}")
    check("HealthCheck" in update["SuspendProcesses"], f"update policy {update}")
    signal = group["CreationPolicy"]["ResourceSignal"]
    check(signal["Count"] == int(group["Properties"]["MinSize"]), f"creation policy {signal}")
    hooks = [item["Properties"] for item in resources.values() if item["Type"] == "AWS::AutoScaling::LifecycleHook"]
    found = {hook["LifecycleTransition"].rpartition("_")[2]: hook["LifecycleHookName"] for hook in hooks}
    wanted = {"LAUNCHING": rehearsal.group.launch_hook, "TERMINATING": rehearsal.group.drain_hook}
    check(found == wanted, f"hooks {hooks}")
    check("ELB" not in group["Properties"]["HealthCheckType"], "the group would replace an instance whose engine is restarted")
    return f"one at a time, {update['PauseTime']}; {signal['Count']} signal in {signal['Timeout']}; hooks {', '.join(found.values())}"


def check_signal(instance: Instance) -> None:
    """One, of success, to the resource that waits; /health answered 200 at that moment."""
    calls = instance.signals()
    check(len(calls) == 1, f"{instance.id} signalled {calls}")
    wanted = {"--logical-resource-id": SIGNAL_RESOURCE, "--unique-id": instance.id, "--status": "SUCCESS", "health": "200"}
    check(wanted.items() <= calls[0].items(), f"{instance.id} signalled {calls[0]}, not {wanted}")


def efs_ids(rehearsal: Rehearsal) -> tuple[str, str]:
    """The deployed file system and its access point."""
    client = rehearsal.emulator.client("efs")
    (file_system,) = client.describe_file_systems()["FileSystems"]
    (access_point,) = client.describe_access_points()["AccessPoints"]
    return file_system["FileSystemId"], access_point["AccessPointId"]

"""Ours, in place of Auto Scaling, which the emulator keeps as records: launches from the deployed template, registers, watches, drains.

Owns the instances. What it does, it does as Auto Scaling documents it: a launch is registered after its signal, a termination waits at the
hook until the agent completes it. Whether the real one does the same is not shown by it. `rehearse.steps` makes one.
"""

import base64
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from infra.artifact import lock_of, read_content
from infra.fleet import GROUP_ID as SIGNAL_RESOURCE
from rehearse.emulator_process import Emulator
from rehearse.errors import Differs, check
from rehearse.instance import Instance
from rehearse.plain_instance import PlainInstance

BOOT_S = 300.0
DRAIN_S = 90.0
WATCH_S = 0.2

__all__ = ["SIGNAL_RESOURCE", "Group"]


class Group:
    """`name`, `launch_hook`, `drain_hook`, `instances` by id. A context manager: its end is the instances' end."""

    def __init__(self, emulator: Emulator, folder: Path, *, shared: Path, has_namespaces: bool) -> None:
        self._emulator, self._folder, self._shared = emulator, folder / "instances", shared
        self._make = Instance if has_namespaces else PlainInstance
        self._folder.mkdir()
        self._asg, self._elb = emulator.client("autoscaling"), emulator.client("elbv2")
        (group,) = self._asg.describe_auto_scaling_groups()["AutoScalingGroups"]
        self.name = group["AutoScalingGroupName"]
        hooks = self._asg.describe_lifecycle_hooks(AutoScalingGroupName=self.name)["LifecycleHooks"]
        names = {item["LifecycleTransition"].rpartition("_")[2]: item["LifecycleHookName"] for item in hooks}
        self.launch_hook, self.drain_hook = names["LAUNCHING"], names["TERMINATING"]
        (target_group,) = self._elb.describe_target_groups()["TargetGroups"]
        self._target_group = target_group["TargetGroupArn"]
        self._lock = lock_of(read_content())
        self.instances: dict[str, Instance] = {}
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Group":
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """The watch and the instances."""
        self._ended.set()
        self._watcher.join()
        for instance in list(self.instances.values()):
            instance.stop()

    def user_data(self) -> str:
        """Of the launch template's version that the group has now."""
        (group,) = self._asg.describe_auto_scaling_groups(AutoScalingGroupNames=[self.name])["AutoScalingGroups"]
        template = group["LaunchTemplate"]
        versions = self._emulator.client("ec2").describe_launch_template_versions(
            LaunchTemplateId=template["LaunchTemplateId"], Versions=[template["Version"]]
        )["LaunchTemplateVersions"]
        return base64.b64decode(versions[0]["LaunchTemplateData"]["UserData"]).decode()

    def launch(self, num: int) -> list[Instance]:
        """So many more, booted at the same time, registered once each signalled success and its agent completed the launch hook. Differs if
        one does not."""
        known = {item["InstanceId"] for item in self._members()}
        self._asg.set_desired_capacity(AutoScalingGroupName=self.name, DesiredCapacity=len(known) + num)
        fresh = [item["InstanceId"] for item in self._members() if item["InstanceId"] not in known]
        check(len(fresh) == num, f"the group has {len(fresh)} new members, not {num}")
        script = for_this_machine(self.user_data())
        made = [self._make(self._folder / id[-6:], id=id, emulator=self._emulator, shared=self._shared, lock=self._lock) for id in fresh]
        self._hold([[id, self.launch_hook] for id in fresh])
        for instance in made:
            self.instances[instance.id] = instance
            instance.start(script)
        for instance in made:
            instance.await_boot(BOOT_S)
            check(instance.signals(), f"{instance.id} sent no signal: a deploy would wait for it")
            self._await_completed(instance, self.launch_hook)
        self._hold([])
        for instance in made:
            self._elb.register_targets(TargetGroupArn=self._target_group, Targets=[{"Id": instance.id, "Port": instance.port}])
        return made

    def kill(self, instance: Instance) -> float:
        """Its power goes. The monotonic second from when on the load balancer, told by the watch, sends it nothing more."""
        instance.stop()
        deadline = time.monotonic() + DRAIN_S
        while instance.id in self.targets():
            check(time.monotonic() < deadline, f"the watch did not take {instance.id} out of the load balancer")
            time.sleep(0.05)
        return time.monotonic()

    def drain(self, instance: Instance) -> float:
        """As a scale-in ends it; seconds until its agent completed the hook. Differs if it did not."""
        started_at = time.monotonic()
        self._hold([[instance.id, self.drain_hook]])
        self._deregister(instance)
        instance.imds.values["autoscaling/target-lifecycle-state"] = "Terminated"
        self._await_completed(instance, self.drain_hook)
        self._hold([])
        took_s = time.monotonic() - started_at
        instance.stop()
        return took_s

    def _hold(self, transitions: list[list[str]]) -> None:
        """[instance, hook] of each transition that waits from now on."""
        (self._emulator.state / "waiting.json").write_text(json.dumps(transitions))

    def _await_completed(self, instance: Instance, hook: str) -> None:
        deadline, wanted = time.monotonic() + DRAIN_S, {"instance": instance.id, "operation": "CompleteLifecycleAction", "hook": hook}
        while not any(wanted.items() <= call.items() for call in self.hook_calls()):
            if time.monotonic() > deadline:
                raise Differs(f"the agent of {instance.id} did not complete the hook {hook} within {DRAIN_S:.0f} s")
            time.sleep(0.1)

    def hook_calls(self) -> list[dict[str, Any]]:
        """The calls of hooks that the emulator accepted."""
        path = self._emulator.state / "hooks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def targets(self) -> set[str]:
        """The ids that the load balancer sends requests to."""
        health = self._elb.describe_target_health(TargetGroupArn=self._target_group)["TargetHealthDescriptions"]
        return {item["Target"]["Id"] for item in health}

    def _members(self) -> list[dict[str, Any]]:
        return self._asg.describe_auto_scaling_groups(AutoScalingGroupNames=[self.name])["AutoScalingGroups"][0]["Instances"]

    def _deregister(self, instance: Instance) -> None:
        self._elb.deregister_targets(TargetGroupArn=self._target_group, Targets=[{"Id": instance.id}])

    def _watch(self) -> None:
        """Takes out of the load balancer who is gone."""
        gone: set[str] = set()
        while not self._ended.wait(WATCH_S):
            for instance in list(self.instances.values()):
                if instance.id not in gone and (instance.state / "boot").exists() and not instance.is_alive():
                    self._deregister(instance)
                    gone.add(instance.id)


def for_this_machine(user_data: str) -> str:
    """The two settings that a machine without a GPU cannot have as deployed: the device, and threads that share the cores with another
    instance and with what calls them. Differs if user-data has no device to change."""
    num_threads = max(1, (os.cpu_count() or 1) // 3)
    changed = f"MANYLORA_DEVICE='cpu'\nMANYLORA_NUM_THREADS='{num_threads}'"
    script, num_changed = re.subn(r"(?m)^MANYLORA_DEVICE='cuda'$", changed, user_data)
    check(num_changed == 1, "user-data does not set MANYLORA_DEVICE='cuda': nothing to change for a machine without a GPU")
    return script

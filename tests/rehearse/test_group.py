"""What the stand-in for Auto Scaling changes of the deployed user-data, and what the load under it counts as lost."""

import json
from types import SimpleNamespace

import pytest

from rehearse.errors import Differs
from rehearse.group import Group, for_this_machine
from rehearse.load import Load


def test_device_and_threads_are_all_that_is_changed():
    text = "MANYLORA_ADAPTERS_DIR='/mnt'\nMANYLORA_DEVICE='cuda'\nMANYLORA_PORT='8080'\n"
    changed = for_this_machine(text).splitlines()
    assert changed[1] == "MANYLORA_DEVICE='cpu'" and changed[2].startswith("MANYLORA_NUM_THREADS='")
    assert [changed[0], changed[3]] == [text.splitlines()[0], text.splitlines()[2]]


def test_user_data_without_a_device_is_not_the_deployed_one():
    with pytest.raises(Differs, match="nothing to change"):
        for_this_machine("MANYLORA_DEVICE='cpu'\n")


class Gateway:
    """Answers in turn from a list, then 200."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)

    def generate(self, prompt: str, **parameters: object) -> SimpleNamespace:
        status = self.statuses.pop(0) if self.statuses else 200
        return SimpleNamespace(status_code=status, headers={"x-rehearse-target": "i-1"}, text="text")


def test_a_load_counts_errors_as_lost_and_the_limit_as_nothing():
    with Load(Gateway(502, 429, 503), num_threads=1) as load:
        load.await_answers({"i-1"})
    assert [item.status for item in load.failed] == [502, 503]
    assert all(item.status == 200 for item in load.answers if item not in load.failed)


def test_a_load_that_a_target_does_not_answer_differs(monkeypatch):
    monkeypatch.setattr("rehearse.load._PATIENCE_S", 0.2)
    with Load(Gateway(), num_threads=1) as load, pytest.raises(Differs, match="i-2"):
        load.await_answers({"i-2"})


class Aws:
    """A group of one template in the place of the emulator, and an agent that completes what waits when the test says so."""

    def __init__(self, state) -> None:
        self.state, self.members, self.targets = state, [], []
        transition = "autoscaling:EC2_INSTANCE_"
        self.hooks = [
            {"LifecycleHookName": "drain", "LifecycleTransition": f"{transition}TERMINATING"},
            {"LifecycleHookName": "launch", "LifecycleTransition": f"{transition}LAUNCHING"},
        ]

    def client(self, name):
        return self

    def describe_auto_scaling_groups(self, **_):
        return {"AutoScalingGroups": [{"AutoScalingGroupName": "fleet", "Instances": [{"InstanceId": id} for id in self.members]}]}

    def describe_lifecycle_hooks(self, **_):
        return {"LifecycleHooks": self.hooks}

    def describe_target_groups(self):
        return {"TargetGroups": [{"TargetGroupArn": "arn:target-group"}]}

    def set_desired_capacity(self, DesiredCapacity, **_):
        self.members += [f"i-{n:06}" for n in range(len(self.members), DesiredCapacity)]

    def register_targets(self, Targets, **_):
        self.targets += [item["Id"] for item in Targets]

    def deregister_targets(self, Targets, **_):
        self.targets = [id for id in self.targets if id != Targets[0]["Id"]]

    def complete(self, instance: str) -> None:
        """As an agent does: what waits for this instance, if anything."""
        for id, hook in json.loads((self.state / "waiting.json").read_text()):
            if id == instance:
                line = {"operation": "CompleteLifecycleAction", "instance": id, "hook": hook}
                with (self.state / "hooks.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")


class Booted:
    """An instance whose boot is over at once."""

    completes = True

    def __init__(self, folder, *, id, emulator, shared, lock) -> None:
        self.id, self.port, self._aws, self.state = id, 8080, emulator, folder
        self.imds = SimpleNamespace(values={})

    def start(self, script) -> None:
        pass

    def await_boot(self, limit_s) -> None:
        assert not self._aws.targets  # held until its agent speaks
        if self.completes:
            self._aws.complete(self.id)

    def signals(self):
        return [{}]

    def stop(self) -> None:
        pass


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr("rehearse.group.PlainInstance", Booted)
    monkeypatch.setattr("rehearse.group.DRAIN_S", 0.3)
    monkeypatch.setattr(Group, "user_data", lambda self: "MANYLORA_DEVICE='cuda'")
    (tmp_path / "state").mkdir()
    return Group(Aws(tmp_path / "state"), tmp_path, shared=tmp_path, has_namespaces=False)


def test_a_launch_is_registered_once_its_agent_completed_the_hook(group, monkeypatch):
    made = group.launch(2)
    assert [call["hook"] for call in group.hook_calls()] == ["launch", "launch"]
    assert group._emulator.targets == [item.id for item in made]
    monkeypatch.setattr(Booted, "completes", False)
    group._emulator.targets.clear()
    with pytest.raises(Differs, match="did not complete the hook launch"):
        group.launch(1)
    assert not group._emulator.targets


def test_a_drain_ends_with_the_other_hook(group):
    first, second = group.launch(2)
    with pytest.raises(Differs, match="did not complete the hook drain"):
        group.drain(first)
    assert first.imds.values["autoscaling/target-lifecycle-state"] == "Terminated"
    (group._emulator.state / "hooks.jsonl").write_text(
        json.dumps({"operation": "CompleteLifecycleAction", "instance": second.id, "hook": "drain"})
    )
    assert group.drain(second) < 1 and group._emulator.targets == []

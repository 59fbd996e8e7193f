"""A hook is completed once something waits there, and given up when nothing does. While Auto Scaling does not answer, no failed call uses
up a try, and none is made in a hurry."""

import time

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError

from server.host import lifecycle
from server.host.lifecycle import Completion
from tests.server.host.test_agent import machine  # noqa: F401 - a fixture

THROTTLED = ClientError({"Error": {"Code": "Throttling", "Message": "Rate exceeded"}}, "CompleteLifecycleAction")
AWAY = ConnectTimeoutError(endpoint_url="https://autoscaling.us-east-1.amazonaws.com")


class Answers:
    """A group that answers as the test says, and when it was asked."""

    def __init__(self, monkeypatch) -> None:
        self.answer, self.now, self.asked = False, 1000.0, []
        monkeypatch.setattr(lifecycle.time, "monotonic", lambda: self.now)
        self.completion = Completion(self, "launch")

    def complete_hook(self, hook: str) -> bool:
        self.asked.append(self.now)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def goes_on(self, answer, seconds: int) -> int:
        """How often it went through."""
        self.answer, through = answer, 0
        for _ in range(0, seconds, 5):
            try:
                through += self.completion.step()
            except type(answer):
                pass
            self.now += 5
        return through


@pytest.fixture
def group(monkeypatch):
    return Answers(monkeypatch)


@pytest.mark.parametrize("failure", [THROTTLED, AWAY])
def test_an_hour_of_failed_calls_leaves_every_try(group, failure):
    assert group.goes_on(failure, 3600) == 0
    pauses = [later - sooner for sooner, later in zip(group.asked, group.asked[1:], strict=False)]
    assert pauses[:5] == [5, 10, 20, 40, 60] and set(pauses[5:]) == {60}
    num_failed = len(group.asked)
    assert group.goes_on(False, 3600) == 0 and len(group.asked) == num_failed + 7


def test_what_waits_goes_on_with_the_first_answer(group):
    group.goes_on(False, 60)
    group.goes_on(AWAY, 1200)
    assert group.goes_on(True, 600) == 1


@pytest.fixture
def asked(machine, monkeypatch):  # noqa: F811
    """The hooks that were to be completed, whether or not anything waited, and a clock that each step of `run` moves on."""
    hooks, clock = [], [time.monotonic()]
    complete = machine.group.complete_hook
    monkeypatch.setattr(machine.group, "complete_hook", lambda hook: hooks.append(hook) or complete(hook))
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: clock[0])

    def run(part, seconds):
        for _ in range(int(seconds / 5)):
            part.step()
            clock[0] += 5

    return hooks, run


def test_a_hook_at_which_nothing_waits_is_given_up(machine, asked):  # noqa: F811
    """An agent that was started anew in an instance in service, and one whose termination went on without it."""
    hooks, run = asked
    watched = machine.lifecycle(launch_hook="launch")
    run(watched, 3600)
    assert hooks == ["launch"] * 7
    machine.target("Terminated")
    run(watched, 5)
    watched._stopping.wait(10)
    run(watched, 3600)
    assert watched.drained and hooks == ["launch"] * 7 + ["drain"] * 7


def test_a_hook_that_begins_to_wait_late_is_completed_and_not_again(machine, asked):  # noqa: F811
    hooks, run = asked
    watched = machine.lifecycle(launch_hook="launch")
    run(watched, 30)
    machine.autoscaling.waiting.add("launch")
    run(watched, 3600)
    assert machine.autoscaling.calls == [("CompleteLifecycleAction", "launch")] and len(hooks) == 4

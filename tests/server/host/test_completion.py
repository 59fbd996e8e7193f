"""A hook's completion while Auto Scaling does not answer: no failed call uses up a try, and none is made in a hurry."""

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError

from server.host import lifecycle
from server.host.lifecycle import Completion

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

"""When the engine's loop captures the steps that it did not start with."""

from types import SimpleNamespace

import pytest
import torch

from server.engine import process
from server.engine.core import EngineCore
from server.engine.process import IDLE_WAIT_S, EngineLoop
from server.ipc.messages import EngineStats, Shutdown


class Captor:
    """A core that has steps to capture, by a clock of its own: a capture takes 0.1 s, a turn of the loop 0.01 s."""

    num_steps, grammars, scheduler = 0, (), SimpleNamespace(num_waiting=0)

    def __init__(self, *, has_work, num_left, num_wanted):
        self.has_work, self.num_left, self.num_wanted, self.captured_at, self.now = has_work, num_left, num_wanted, [], 100.0

    def num_to_capture(self, *, only_wanted=False):
        return self.num_wanted if only_wanted else self.num_left

    def capture_more(self, *, only_wanted):
        assert only_wanted == self.has_work
        self.captured_at.append(round(self.now, 2))
        self.num_left, self.num_wanted, self.now = self.num_left - 1, max(0, self.num_wanted - 1), self.now + 0.1

    def step(self):
        return []

    def stats(self):
        return EngineStats()

    def abort_all(self): ...

    def take_outputs(self):
        return []


@pytest.mark.parametrize(
    ("has_work", "num_left", "num_wanted", "captured_at"),
    [
        (False, 4, 0, [100.01, 100.12, 100.23, 100.34]),  # nothing to do: one after the other, until all are there
        (True, 4, 0, []),  # steps do not wait for what nobody wanted
        (True, 9, 9, [100.01, 101.12, 102.23]),  # and for what was wanted a tenth of the time
    ],
)
def test_missing_steps_are_captured_while_there_is_nothing_to_do_or_at_times_if_wanted(
    monkeypatch, has_work, num_left, num_wanted, captured_at
):
    core, waits = Captor(has_work=has_work, num_left=num_left, num_wanted=num_wanted), []

    class Socket:
        def receive(self, wait_s):
            waits.append(wait_s)
            core.now += 0.01
            return [Shutdown()] if core.now > 102.5 else []

        def send(self, message): ...

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: core.now))
    EngineLoop(Socket(), core, SimpleNamespace(enter=lambda *_: None)).run()
    assert core.captured_at == captured_at
    assert set(waits) == ({0.0} if has_work else {0.0, IDLE_WAIT_S})


def test_between_a_clients_requests_nothing_is_captured_but_once_it_is_over(monkeypatch):
    """The next request of who asks again at once would wait for it."""

    class OneClient(Captor):
        @property
        def has_work(self):
            return self.now < 101 and round(self.now * 100) % 5 < 3  # 30 ms of steps, 20 ms of thought

        @has_work.setter
        def has_work(self, _): ...

        def capture_more(self, *, only_wanted):
            self.captured_at.append(round(self.now, 2))
            self.now += 0.1

    core = OneClient(has_work=None, num_left=80, num_wanted=0)

    class Socket:
        def receive(self, wait_s):
            core.now += 0.01
            return [Shutdown()] if core.now > 102 else []

        def send(self, message): ...

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: core.now))
    EngineLoop(Socket(), core, SimpleNamespace(enter=lambda *_: None)).run()
    assert core.captured_at[0] == pytest.approx(101 + process.QUIET_S, abs=0.03) and core.captured_at[-1] <= 102


def test_nothing_is_captured_after_a_shutdown(monkeypatch):
    core = Captor(has_work=True, num_left=9, num_wanted=9)
    socket = SimpleNamespace(receive=lambda wait_s: [Shutdown()], send=lambda message: None)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: core.now))
    EngineLoop(socket, core, SimpleNamespace(enter=lambda *_: None)).run()
    assert core.captured_at == []


@pytest.mark.parametrize("error", [MemoryError("little left"), torch.OutOfMemoryError("no room"), torch.AcceleratorError("lost")])
def test_a_capture_that_fails_is_the_last_and_ends_the_engine_only_with_the_device(error):
    given_up = []

    def fail(*, only_wanted):
        raise error

    graphs = SimpleNamespace(capture_more=fail, captures=SimpleNamespace(give_up=lambda: given_up.append(True)))
    core = EngineCore(None, SimpleNamespace(graphs=graphs), None, None, None)
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.AcceleratorError):
            core.capture_more()
    else:
        core.capture_more()
        assert given_up == [True]

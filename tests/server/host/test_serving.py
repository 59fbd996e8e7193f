"""The watch over the server: an engine that comes back keeps its instance, a server that does not come back loses it; and the
watch over the agent."""

import re
import socket

import pytest

from server.errors import SHUTTING_DOWN
from server.host import serving
from server.host.agent import _parse, tell_watchdog
from server.host.load import ServerProbe
from server.host.serving import ServingWatch
from tests.server.host.test_agent import ROOT, machine  # noqa: F401 - a fixture

AWAY = (503, '{"error": "unhealthy: the engine is starting", "error_type": "healthcheck"}')
WELL, GONE = (200, ""), (0, "")
LEAVING = (503, f'{{"error": "unhealthy: {SHUTTING_DOWN}", "error_type": "healthcheck"}}')


class Watched:
    """A watch whose server answers as the test says, for as long as it says, asked every five seconds."""

    def __init__(self, machine, monkeypatch) -> None:  # noqa: F811
        self.machine, self.now, self.answer, self.is_wanted, self.marks = machine, 1000.0, WELL, True, 0
        monkeypatch.setattr(serving.time, "monotonic", lambda: self.now)
        mark = machine.group.mark_unhealthy
        monkeypatch.setattr(machine.group, "mark_unhealthy", lambda reason: (mark(reason), setattr(self, "marks", self.marks + 1)))
        probe = ServerProbe(9)
        monkeypatch.setattr(probe, "health", lambda: self.answer)
        self.watch = ServingWatch(probe, machine.group, is_wanted=lambda: self.is_wanted, start_s=1200, heal_s=600, drain_s=900)

    def goes_on(self, answer, seconds) -> "Watched":
        self.answer = answer
        for _ in range(0, seconds, 5):
            self.watch.step()
            self.now += 5
        return self


@pytest.fixture
def watched(machine, monkeypatch):  # noqa: F811
    return Watched(machine, monkeypatch)


def test_an_engine_that_is_started_again_keeps_its_instance(watched):
    for _ in range(5):
        watched.goes_on(WELL, 400).goes_on(AWAY, 300)
    assert watched.machine.health == "Healthy"


@pytest.mark.parametrize(("well_s", "away_s", "num_rounds"), [(15, 585, 2), (100, 200, 5)])
def test_one_that_is_away_more_than_it_is_there_is_replaced(watched, well_s, away_s, num_rounds):
    watched.goes_on(WELL, 3600)  # is no credit
    for _ in range(num_rounds - 1):
        watched.goes_on(AWAY, away_s).goes_on(WELL, well_s)
    assert watched.machine.health == "Healthy"
    watched.goes_on(AWAY, away_s)
    assert watched.machine.health == "Unhealthy"


def test_a_mark_that_the_group_did_not_act_on_is_taken_back(watched):
    """Its processes are suspended while a deploy or a roll goes on; once they resume, the instance would go though it serves."""
    watched.goes_on(WELL, 10).goes_on(GONE, 610).goes_on(WELL, 15)
    assert watched.machine.health == "Unhealthy"  # not yet: it may be gone again
    watched.goes_on(WELL, 10)
    assert watched.machine.health == "Healthy"


@pytest.mark.parametrize("reason", ["gpu", "spot"])
def test_another_ones_mark_is_not_taken_back(watched, reason):
    watched.goes_on(WELL, 10).goes_on(GONE, 610)
    watched.machine.group.mark_unhealthy(reason)
    watched.goes_on(WELL, 600)
    assert watched.machine.health == "Unhealthy"


def test_a_mark_of_which_the_answer_was_lost_is_taken_back_too(watched, monkeypatch):
    mark = watched.machine.group.mark_unhealthy
    with monkeypatch.context() as patch:
        patch.setattr(watched.machine.group, "mark_unhealthy", lambda reason: (mark(reason), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            watched.goes_on(WELL, 10).goes_on(GONE, 610)
    assert watched.machine.health == "Unhealthy"
    watched.goes_on(WELL, 30)
    assert watched.machine.health == "Healthy"


@pytest.mark.fault(
    "Machine", "a server that does not come back: its engine cannot start, or its port is shut", "503, on the other instances nothing",
    "the load balancer lets go of the instance; its agent marks it unhealthy after `fleet.heal_s`, and it is replaced. An engine that is "
    "back before costs no instance",
)  # fmt: skip
@pytest.mark.parametrize("answer", [AWAY, GONE])
def test_a_server_that_does_not_come_back_loses_it(watched, answer):
    watched.goes_on(WELL, 10).goes_on(answer, 595)
    assert watched.machine.health == "Healthy"
    watched.goes_on(answer, 10)
    assert watched.machine.health == "Unhealthy" and watched.marks == 1
    watched.goes_on(answer, 590)
    assert watched.marks == 1  # the group has heard it
    watched.goes_on(answer, 20)
    assert watched.marks == 2  # and did nothing: its processes may have been suspended


def test_a_server_that_never_served_has_the_time_of_a_start(watched):
    """After a reboot, or out of a warm pool; on a first boot the launch hook's time is over as well."""
    watched.goes_on(GONE, 600).goes_on(AWAY, 600)
    assert watched.machine.health == "Healthy"
    watched.goes_on(AWAY, 10)
    assert watched.machine.health == "Unhealthy"


def test_a_server_that_was_told_to_stop_is_not_ill(watched):
    """A release that is rolled: a drain may take longer than a start."""
    watched.goes_on(WELL, 10).goes_on(AWAY, 500).goes_on(LEAVING, 900).goes_on(GONE, 500)
    assert watched.machine.health == "Healthy"


def test_one_that_was_told_to_stop_and_does_not_is_ill_in_the_end(watched):
    """After the drain's own time and two minutes."""
    watched.goes_on(WELL, 10).goes_on(LEAVING, 1020 + 590)
    assert watched.machine.health == "Healthy"
    watched.goes_on(LEAVING, 20)
    assert watched.machine.health == "Unhealthy"


def test_a_server_that_is_not_wanted_is_not_missed(watched):
    watched.is_wanted = False  # drained, in a warm pool, on its way out
    watched.goes_on(WELL, 10).goes_on(GONE, 3600)
    assert watched.machine.health == "Healthy"
    watched.is_wanted = True
    watched.goes_on(GONE, 1190)  # out of a warm pool it is started anew
    assert watched.machine.health == "Healthy"
    watched.goes_on(GONE, 10)
    assert watched.machine.health == "Unhealthy"


def test_a_mark_that_did_not_get_through_is_made_again(watched, monkeypatch):
    def refuse(reason):
        raise RuntimeError("Throttling")

    with monkeypatch.context() as patch:
        patch.setattr(watched.machine.group, "mark_unhealthy", refuse)
        with pytest.raises(RuntimeError):
            watched.goes_on(WELL, 10).goes_on(GONE, 700)
    watched.goes_on(GONE, 10)
    assert watched.machine.health == "Unhealthy"


@pytest.mark.parametrize(("state", "is_wanted"), [("InService", True), ("Warmed:Running", False), ("Terminated", False)])
def test_an_instance_is_wanted_where_the_group_says_so(machine, state, is_wanted):  # noqa: F811
    machine.target(state)
    lifecycle = machine.lifecycle()
    lifecycle._settle_s = 60.0
    assert not lifecycle.is_wanted
    lifecycle.step()
    assert lifecycle.is_wanted == is_wanted


def test_systemds_watchdog_hears_that_the_agent_goes_round(tmp_path):
    tell_watchdog("")
    for address, bound in ((str(tmp_path / "notify"), str(tmp_path / "notify")), (f"@{tmp_path.name}", f"\0{tmp_path.name}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(bound)
            tell_watchdog(address)
            assert systemd.recv(100) == b"WATCHDOG=1"


def test_the_unit_gives_the_agent_what_it_asks_for():
    """With WatchdogSec, an agent that does not know systemd's socket would be killed again and again."""
    unit = (ROOT / "ami" / "manylora-agent.service").read_text()
    (started,) = re.findall(r"^ExecStart=.* -m server.host.agent (.*)$", unit, re.MULTILINE)
    assert re.search(r"^WatchdogSec=\d+$", unit, re.MULTILINE) and "--notify-socket ${NOTIFY_SOCKET}" in started
    _parse(re.sub(r"\$\{\w+\}", "9", started).split())  # or SystemExit

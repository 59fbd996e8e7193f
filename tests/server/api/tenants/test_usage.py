"""A minute's tokens: the window, and what the servers of a fleet tell each other."""

import os
from pathlib import Path

import pytest

from server.api.tenants.usage import FleetUsage, Window


def test_the_window_is_a_minute() -> None:
    window = Window()
    window.add(10, 100.2)
    window.add(5, 100.9)
    window.add(7, 130.0)
    assert window.used(131) == 22 and window.used(159.9) == 22 and window.used(160.0) == 7 and window.used(190) == 0
    window.give_back(7, 130.0)  # its second is over
    assert window.used(191) == 0


def test_what_is_given_back_counts_where_it_was_taken() -> None:
    window = Window()
    window.add(100, 10.0)
    window.add(20, 40.0)
    window.give_back(90, 10.5)
    assert window.used(50) == 30 and window.used(70) == 20


def test_how_long_until_there_is_room() -> None:
    window = Window()
    window.add(10, 100.0)
    window.add(10, 120.0)
    assert window.wait_s(10, 130.0) == 30 and window.wait_s(11, 130.0) == 50 and window.wait_s(21, 130.0) == 60


def test_servers_tell_each_other(tmp_path: Path) -> None:
    one, two, three = (FleetUsage(tmp_path, name) for name in ("one", "two", "three"))
    assert one.exchange({"tenant/acme": 10}) == {}
    assert two.exchange({"tenant/acme": 5, "tenant/beta": 1}) == {"tenant/acme": 10}
    assert three.exchange({}) == {"tenant/acme": 15, "tenant/beta": 1}
    assert one.exchange({"tenant/acme": 20}) == {"tenant/acme": 5, "tenant/beta": 1}
    two.close()
    assert three.exchange({}) == {"tenant/acme": 20}


def test_a_server_that_uses_as_much_in_each_minute_is_heard(tmp_path: Path) -> None:
    now = [1_000_000.0]
    steady, other = FleetUsage(tmp_path, "steady", clock=lambda: now[0]), FleetUsage(tmp_path, "other")
    steady.exchange({"tenant/acme": 600})
    written = tmp_path / "steady.json"
    for seconds, is_told in ((100, True), (5, False), (-200, True)):  # the clock may be stepped back
        now[0] += seconds
        os.utime(written, (written.stat().st_mtime - 100,) * 2)  # what it was told before is as old as that
        steady.exchange({"tenant/acme": 600})
        assert other.exchange({}) == ({"tenant/acme": 600} if is_told else {})
    steady.exchange({})
    now[0] += 100
    before = written.stat().st_mtime_ns
    steady.exchange({})  # there is nothing to tell
    assert written.stat().st_mtime_ns == before


def test_a_dead_server_uses_nothing(tmp_path: Path) -> None:
    now = [1_000_000.0]
    dead = FleetUsage(tmp_path, "dead")
    dead.exchange({"tenant/acme": 10})
    alive = FleetUsage(tmp_path, "alive", clock=lambda: now[0])
    for age_s, used, is_there in ((80, {"tenant/acme": 10}, True), (100, {}, True), (4000, {}, False)):
        if (tmp_path / "dead.json").exists():
            os.utime(tmp_path / "dead.json", (now[0] - age_s,) * 2)
        assert alive.exchange({}) == used
        assert (tmp_path / "dead.json").exists() == is_there


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"used": 1}', '{"used": {"tenant/acme": "many"}}', '{"used": {"tenant/acme": -5}}'])
def test_a_broken_file_counts_for_nothing(tmp_path: Path, text: str) -> None:
    usage = FleetUsage(tmp_path, "one")
    (tmp_path / "broken.json").write_text(text)
    assert usage.exchange({}) == {}

"""Rollback: the version before answers again, on every server, as long as its weights are kept."""

import os
import time
from typing import Any

import pytest

from server.api.registry import NOTHING, Entry, Version
from server.api.versions import MAX_KEPT, published, rolled_back, to_return_to
from server.errors import AdapterNotFound, Conflict
from tests.server.api.fleet import answered, order, publish, rows, write
from tests.server.api.live import wait_for


def version(number: int) -> Version:
    return Version(hash=f"{number:064d}", number=0, source="local", adapter_id="x", size_bytes=1, published_at=1, rank=1)


def entry_of(*numbers: int) -> Entry:
    entry = NOTHING
    for now, number in enumerate(numbers, 1):
        entry = published(entry, version(number), now, None)
    return entry


def test_each_version_has_a_number_and_some_before_it_are_kept() -> None:
    entry = entry_of(*range(1, MAX_KEPT + 4))
    assert entry.version is not None and entry.version.number == entry.last_number == MAX_KEPT + 3
    assert [one.number for one in entry.past] == list(range(3, MAX_KEPT + 3))
    assert published(entry, version(MAX_KEPT + 3), 99, True) == published(entry, version(MAX_KEPT + 3), 98, True)  # the same weights


def test_a_rollback_takes_the_number_of_what_it_goes_back_to_and_publishing_goes_on_counting() -> None:
    entry = entry_of(1, 2, 3)
    entry = rolled_back("n", entry, to_return_to("n", entry), 10)
    assert entry.version is not None and (entry.version.number, entry.changed, len(entry.past)) == (2, 10, 1)
    entry = published(entry, version(4), 11, None)
    assert entry.version is not None and entry.version.number == 4 and [one.number for one in entry.past] == [1, 2]


def test_what_cannot_be_rolled_back_says_why() -> None:
    with pytest.raises(AdapterNotFound, match="not published"):
        to_return_to("n", NOTHING)
    with pytest.raises(Conflict, match="no version before 1"):
        to_return_to("n", entry_of(1))
    entry = entry_of(1, 2)
    wanted = to_return_to("n", entry)
    with pytest.raises(Conflict, match="meanwhile"):
        rolled_back("n", published(entry, version(3), 5, None), wanted, 6)


def test_over_http_on_two_servers(pair) -> None:
    a, b = pair
    hashes = []
    for seed in (1, 2, 3):
        hashes.append(write(a, "turned", seed=seed))
        publish(a, "turned", id="turned", pin=True)
    assert answered(a, "turned") == hashes[2] and rows(a)["turned"]["past_versions"] == [1, 2]
    row: dict[str, Any] = order(a, "adapters/turned/rollback")
    assert (row["version"], row["hash"], row["past_versions"], row["pinned"]) == (2, hashes[1], [1], True)
    assert answered(a, "turned") == hashes[1]
    wait_for(lambda: rows(b)["turned"]["version"] == 2)
    assert answered(b, "turned") == hashes[1]
    assert order(b, "adapters/turned/rollback")["version"] == 1 and answered(b, "turned") == hashes[0]
    refusal = order(b, "adapters/turned/rollback", status=409)
    assert "no version before 1" in refusal["error"]["message"]
    order(a, "adapters/nobody/rollback", status=404)


def test_weights_that_a_rollback_may_need_are_not_pruned(pair) -> None:
    live, _ = pair
    old = write(live, "kept-old", seed=11)
    publish(live, "kept-old")
    write(live, "kept-old", seed=12)
    publish(live, "kept-old")
    lies = live.api.publisher.registry.folder / "objects"
    long_ago = time.time() - 86_400
    for folder in lies.iterdir():
        os.utime(folder, (long_ago, long_ago))
    live.api.publisher._weights.prune(live.api.publisher.registry.read_hashes)
    assert (lies / old).is_dir()
    order(live, "adapters/kept-old", method="DELETE")
    live.api.publisher._weights.prune(live.api.publisher.registry.read_hashes)
    assert not (lies / old).exists()

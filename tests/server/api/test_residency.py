"""When an adapter's memory is freed: once no name means it and its last request has ended, and never because of a late answer."""

import asyncio

import pytest

from server.api.residency import Residency
from server.errors import AdapterRefused
from server.ipc.messages import AdapterEvent, Forget, Prefetch
from server.types import AdapterRef

X, Y = ("local", "x", None), ("local", "y", None)
ONE, TWO = AdapterRef("1" * 64, "/1", "x"), AdapterRef("2" * 64, "/2", "x")


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def residency(told: list[str]) -> Residency:
    return Residency(lambda message: told.append(message.hash) if isinstance(message, Forget) else None)


def resolved(residency: Residency, key, ref: AdapterRef, stamp: int = 0) -> None:
    residency.resolved(key, ref, (stamp,), 8, "base")


def test_a_replaced_version_goes_with_its_last_request(residency: Residency, told: list[str]) -> None:
    resolved(residency, X, ONE)
    with residency.running(ONE.hash):
        with residency.running(ONE.hash):
            resolved(residency, X, TWO)
        assert told == [] and residency.draining() == [(ONE.hash, 1)]
    assert told == [ONE.hash] and residency.draining() == [] and residency.num_requests(ONE.hash) == 0


def test_what_nobody_runs_with_goes_at_once(residency: Residency, told: list[str]) -> None:
    resolved(residency, X, ONE)
    residency.unload(X)
    assert told == [ONE.hash] and residency.use(X) is None
    residency.unload(X)
    assert told == [ONE.hash]


def test_another_name_of_the_same_weights_keeps_them(residency: Residency, told: list[str]) -> None:
    resolved(residency, X, ONE)
    resolved(residency, Y, ONE)
    residency.changed(X, (1,))
    assert told == []
    residency.abandon(ONE.hash)
    assert told == []
    residency.unload(Y)
    assert told == [ONE.hash]


def test_weights_that_a_name_means_again_stay(residency: Residency, told: list[str]) -> None:
    resolved(residency, X, ONE)
    with residency.running(ONE.hash):
        residency.unload(X)
        resolved(residency, X, ONE)
    assert told == []


def test_a_late_answer_of_an_earlier_version_is_freed_after_use_and_means_nothing(residency: Residency, told: list[str]) -> None:
    residency.changed(X, (7,))
    resolved(residency, X, TWO, stamp=7)
    resolved(residency, X, ONE, stamp=3)  # asked before generation 7, answered after
    with residency.running(ONE.hash):
        pass
    assert told[-1] == ONE.hash and TWO.hash not in told
    use = residency.use(X)
    assert use is not None and use.ref == TWO


async def test_loading_waits_for_the_engine() -> None:
    asked: list[str] = []
    residency = Residency(lambda message: asked.append(message.adapter.hash) if isinstance(message, Prefetch) else None)
    assert await residency.load(ONE, 0.01) is False
    waiting = [asyncio.create_task(residency.load(ONE, 5)) for _ in range(3)]
    await asyncio.sleep(0)
    residency.take(AdapterEvent(ONE.hash, "loading"))
    residency.take(AdapterEvent(ONE.hash, "host", 10, 0.5))
    assert await asyncio.gather(*waiting) == [True] * 3
    num_asked = len(asked)
    assert await residency.load(ONE, 5) is True and len(asked) == num_asked
    residency.take(AdapterEvent(ONE.hash, "device", 12))
    tier = residency.tier(ONE.hash)
    assert tier is not None and (tier.state, tier.bytes, tier.load_s) == ("device", 12, 0.5)
    residency.take(AdapterEvent(ONE.hash, "absent"))
    assert residency.tier(ONE.hash) is None
    refused = asyncio.create_task(residency.load(ONE, 5))
    await asyncio.sleep(0)
    residency.take(AdapterEvent(ONE.hash, "failed", error="too large"))
    with pytest.raises(AdapterRefused, match="Adapter 'x': too large"):
        await refused
    residency.engine_started()
    assert residency.tier(ONE.hash) is None

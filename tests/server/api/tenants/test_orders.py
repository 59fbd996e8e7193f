"""What a tenant's orders may leave in the registry, however many are given at once."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.api.live import LiveServer
from tests.server.api.tenants.world import RULES, World

_LONG_S = 60.0


def at_once(*asks: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(asks)) as threads:
        return list(threads.map(lambda ask: ask(), asks))


def conflict(answers: list[httpx.Response], limit: str) -> None:
    """One of two got the last place."""
    first, second = sorted(answers, key=lambda answer: answer.status_code)
    assert (first.status_code, second.status_code) == (200, 409) and f"`{limit}`" in second.text, (first.text, second.text)


def meet_in_threads(live: LiveServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both orders have been checked, and neither is written, when they go on."""
    real, barrier = getattr(live.api.publisher, name), threading.Barrier(2, timeout=_LONG_S)

    def met(*arguments):
        barrier.wait()
        return real(*arguments)

    monkeypatch.setattr(live.api.publisher, name, met)


def meet_on_the_loop(live: LiveServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real, barrier = getattr(live.api.publisher, name), asyncio.Barrier(2)

    async def met(*arguments):
        async with asyncio.timeout(_LONG_S):
            await barrier.wait()
        return await real(*arguments)

    monkeypatch.setattr(live.api.publisher, name, met)


def ruled(world: World, live: LiveServer, rules: str) -> None:
    world.write(RULES + rules)
    world.settle(live)


@pytest.mark.parametrize("route", ["adapters", "load_lora_adapter"])
def test_the_last_name_is_given_once(live, world: World, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    taken = sum(name.startswith("beta\\") for name in live.api.publisher.registry.view.names)
    ruled(world, live, f"max_names = {taken + 1}\n")
    meet_in_threads(live, monkeypatch, "_copy")

    def publish(name: str) -> httpx.Response:
        body = {"name": name, "id": "beta/sql"} if route == "adapters" else {"lora_name": name, "lora_path": "beta/sql"}
        return world.ask(live, "beta", "POST", f"/v1/{route}", body, timeout=_LONG_S)

    conflict(at_once(lambda: publish("at-once-a"), lambda: publish("at-once-b")), "max_names")
    held = [name for name in live.api.publisher.registry.view.names if name.startswith("beta\\at-once")]
    assert len(held) == 1
    released = world.ask(live, "beta", "DELETE", f"/v1/adapters/{held[0].removeprefix('beta' + chr(92))}?release=true")
    assert released.status_code == 200


def test_the_last_pin_is_given_once(live, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(world, live, "max_pinned = 1\n")
    names = ("beta/sql", "beta/secret")
    meet_on_the_loop(live, monkeypatch, "_load")
    pins = [lambda name=name: world.ask(live, "beta", "POST", f"/v1/adapters/{name}/pin", timeout=_LONG_S) for name in names]
    conflict(at_once(*pins), "max_pinned")
    for name in names:
        assert world.ask(live, "beta", "POST", f"/v1/adapters/{name}/unpin").status_code == 200


def test_the_last_deletion_is_given_once(live, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(world, live, "max_names = 1\n")
    names = ("beta/sql", "beta/secret")
    meet_on_the_loop(live, monkeypatch, "check_known")
    deletions = [lambda name=name: world.ask(live, "beta", "DELETE", f"/v1/adapters/{name}", timeout=_LONG_S) for name in names]
    conflict(at_once(*deletions), "max_names")
    gone = [name for name in names if live.api.publisher.registry.entry(name).deleted]
    assert len(gone) == 1
    assert world.ask(live, "beta", "DELETE", f"/v1/adapters/{gone[0]}?release=true").status_code == 200


def test_orders_under_way_are_bounded(live, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tenant, over all orders together, and given back."""
    ruled(world, live, "max_orders = 1\n")
    real, begun, go_on = live.api.publisher._copy, threading.Event(), threading.Event()

    def slow(order, *arguments):
        if order.name == "beta\\slow":
            begun.set()
            assert go_on.wait(_LONG_S)
        return real(order, *arguments)

    monkeypatch.setattr(live.api.publisher, "_copy", slow)
    publish = {"name": "slow", "id": "beta/sql"}
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(lambda: world.ask(live, "beta", "POST", "/v1/adapters", publish, timeout=_LONG_S))
        try:
            assert begun.wait(_LONG_S)
            asks = [
                ("POST", "/v1/adapters", {"name": "other", "id": "beta/sql"}), ("POST", "/v1/adapters/beta/sql/load", None),
                ("DELETE", "/v1/adapters/beta/sql", None), ("GET", "/v1/adapters/beta/sql", None),
                ("POST", "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "beta/sql"}),
                ("POST", "/v1/unload_lora_adapter", {"lora_name": "beta/sql"}),
            ]  # fmt: skip
            for method, path, body in asks:
                refused = world.ask(live, "beta", method, path, body)
                assert refused.status_code == 429 and "limit `max_orders` of the tenant is reached (1)" in refused.text, (
                    path,
                    refused.text,
                )
                assert refused.headers["x-manylora-limit"] == "max_orders" and refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            merged = {"ids": ["beta/sql", "common/pirate"], "weights": [1, 0.125]}
            answer = world.generate(live, "beta", None, merged_adapters=merged)
            assert answer.status_code == 429 and "`max_orders`" in answer.text
            assert world.generate(live, "beta", "beta/sql").status_code == 200
            assert world.ask(live, "acme", "POST", "/v1/adapters/acme/sql/load").status_code == 200
            assert world.ask(live, "operator", "POST", "/v1/adapters/beta/sql/load").status_code == 200
        finally:
            go_on.set()
        assert first.result(_LONG_S).status_code == 200
    assert world.generate(live, "beta", None, merged_adapters=merged).status_code == 200
    assert world.ask(live, "beta", "DELETE", "/v1/adapters/slow?release=true").status_code == 200

"""Merges of tenants: how many are kept, whose go, and that one whose request has left is counted all the same."""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from server.api.known import KnownAdapters
from server.api.selection import AdapterSelection, Merge, ResolvedAdapter
from server.api.tenants.limits import LimitBook
from server.api.tenants.merges import MergeBook
from server.api.tenants.rules import Rules, Tenant, parse_rules
from server.errors import AdapterRefused, LimitReached
from server.types import AdapterRef
from tests.server.api.live import wait_for
from tests.server.api.tenants.world import RULES, World


class Store:
    """`pinned` by requests of this server, `used` just now by another one."""

    def __init__(self) -> None:
        self.discarded: list[str] = []
        self.pinned: set[str] = set()
        self.used: set[str] = set()
        self.num_tried = 0

    def is_pinned(self, adapter_hash: str) -> bool:
        return adapter_hash in self.pinned

    def discard_packs(self, adapter_hash: str, *, idle_s: float) -> bool:
        self.num_tried += 1
        if adapter_hash in self.pinned or (idle_s and adapter_hash in self.used):
            return False
        self.discarded.append(adapter_hash)
        return True


class Residency:
    def __init__(self) -> None:
        self.unloaded: list[object] = []

    def unload(self, key: object) -> None:
        self.unloaded.append(key)


@pytest.fixture
def rules() -> Rules:
    return parse_rules({"defaults": {"max_orders": 2, "max_merges": 2}, "tenants": {"acme": {}, "beta": {}}})


@pytest.fixture
def acme(rules: Rules) -> Tenant:
    return rules.tenant("acme")


@pytest.fixture
def beta(rules: Rules) -> Tenant:
    return rules.tenant("beta")


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def book(store: Store) -> MergeBook:
    return MergeBook(LimitBook(), store, Residency(), idle_s=0.01)


def key(weight: float):
    return AdapterSelection("local", merge=Merge(("a", "b"), (1.0, weight))).name_key


def found(name: str) -> ResolvedAdapter:
    return ResolvedAdapter(AdapterRef(name, "/path", name), None, False)


async def merge(book: MergeBook, tenant: Tenant, weight: float, name: str | None = None) -> None:
    async def work() -> ResolvedAdapter:
        return found(name or f"hash-{weight:g}")

    await book.resolve(tenant, key(weight), work, no)


async def no() -> bool:
    return False


async def settled(book: MergeBook) -> None:
    await until(lambda: not book._tasks and not book._leaving)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


async def test_the_least_recently_used_of_ones_own_goes(book: MergeBook, store: Store, acme: Tenant, beta: Tenant) -> None:
    await merge(book, beta, 9)
    for weight in (1, 2, 1, 3):
        await merge(book, acme, weight)
    await settled(book)
    assert store.discarded == ["hash-2"] and book._residency.unloaded == [key(2)]
    for number in range(20):
        await merge(book, acme, 100 + number)
    await settled(book)
    assert len(store.discarded) == 21 and "hash-9" not in store.discarded and len(book._kept["acme"]) == 2
    await merge(book, replace_bound(acme, 5), 200)
    assert len(book._kept["acme"]) == 3


def replace_bound(tenant: Tenant, max_merges: int) -> Tenant:
    return tenant.model_copy(update={"max_merges": max_merges})


async def test_what_is_used_stays(book: MergeBook, store: Store, acme: Tenant, beta: Tenant) -> None:
    """By a request that runs, or by another tenant."""
    await merge(book, acme, 1)
    await merge(book, acme, 2)
    store.pinned = {"hash-1"}
    await merge(book, acme, 3)
    await settled(book)
    assert store.discarded == []
    store.pinned = set()
    await merge(book, beta, 2)
    await merge(book, acme, 4)
    await settled(book)
    assert store.discarded == ["hash-1"] and list(book._kept["acme"]) == [key(3), key(4)]
    await merge(book, beta, 5)
    await merge(book, beta, 6)  # the last tenant that had hash-2
    await settled(book)
    assert store.discarded == ["hash-1", "hash-2"]


async def test_a_merge_of_replaced_adapters_takes_the_place_of_the_old_one(book: MergeBook, store: Store, acme: Tenant) -> None:
    await merge(book, acme, 1)
    await merge(book, acme, 1, "new")
    await merge(book, acme, 1, "new")
    await settled(book)
    assert store.discarded == ["hash-1"] and book._num_tenants == Counter({"new": 1})


async def test_a_replaced_merge_goes_when_its_last_request_has_ended(book: MergeBook, store: Store, acme: Tenant) -> None:
    await merge(book, acme, 1)
    store.pinned = {"hash-1"}
    await merge(book, acme, 1, "new")
    await until(lambda: store.num_tried > 1)
    assert store.discarded == [] and list(book._leaving) == ["hash-1"]
    store.pinned = set()
    await settled(book)
    assert store.discarded == ["hash-1"]


async def test_a_pack_that_another_server_uses_stays(book: MergeBook, store: Store, acme: Tenant) -> None:
    store.used = {"hash-1"}
    for weight in (1, 2, 3, 4):
        await merge(book, acme, weight)
    await until(lambda: store.num_tried > 3)
    assert store.discarded == ["hash-2"]  # one that nobody uses waits for none
    store.used = set()
    await settled(book)
    assert store.discarded == ["hash-2", "hash-1"]


async def test_what_is_asked_for_again_before_it_goes_stays(book: MergeBook, store: Store, acme: Tenant, beta: Tenant) -> None:
    """By whom it was, by another tenant, or under way at the moment."""
    book.idle_s = 2.0
    go_on = asyncio.Event()

    async def slow() -> ResolvedAdapter:
        await go_on.wait()
        return found("hash-3")

    for weight in (1, 2, 3, 4, 5):  # 1, 2 and 3 leave
        await merge(book, acme, weight)
    assert list(book._leaving) == ["hash-1", "hash-2", "hash-3"] and store.num_tried == 0
    await merge(book, beta, 2)
    asked = asyncio.create_task(book.resolve(beta, key(3), slow, no))
    before = book._leaving["hash-3"]
    await until(lambda: book._leaving["hash-3"] != before)  # its turn came, and it was under way
    assert store.discarded == ["hash-1"] and list(book._leaving) == ["hash-3"]
    go_on.set()
    await asked
    await settled(book)
    assert store.discarded == ["hash-1"] and list(book._kept["beta"].values()) == ["hash-2", "hash-3"]
    book.idle_s = 600.0
    await merge(book, acme, 6)
    book.close()
    await until(book._discarding.done)


async def test_merges_that_are_made_take_places_of_orders(book: MergeBook, acme: Tenant, beta: Tenant) -> None:
    """Also when whoever asked for them has left; one place however many ask for the same, none for what is known."""
    go_on = asyncio.Event()

    async def slow() -> ResolvedAdapter:
        await go_on.wait()
        return found("slow")

    async def failing() -> ResolvedAdapter:
        await go_on.wait()
        raise AdapterRefused("no")

    await merge(book, acme, 9)
    same = [asyncio.create_task(book.resolve(acme, key(1), slow, no)) for _ in range(5)]
    gone = asyncio.create_task(book.resolve(acme, key(2), failing, no))
    await until(lambda: len(book._limits._orders.get("acme", ())) == 2)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    with pytest.raises(LimitReached, match=r"limit `max_orders` of the tenant is reached \(2\)") as caught:
        await merge(book, acme, 3)
    assert caught.value.headers["x-manylora-limit"] == "max_orders"
    await merge(book, acme, 9)
    await merge(book, beta, 3)
    go_on.set()
    assert {one.ref.hash for one in await asyncio.gather(*same)} == {"slow"}
    await settled(book)
    await merge(book, acme, 3)
    assert not book._limits._orders and not book._num_asked


async def test_merges_that_are_on_disk_take_no_place(book: MergeBook, acme: Tenant) -> None:
    """Of an earlier run of the server; whether they are is looked up once for all that ask. Who cannot tell takes a place."""
    num_looks, go_on = 0, asyncio.Event()

    async def yes() -> bool:
        nonlocal num_looks
        num_looks += 1
        await go_on.wait()
        return True

    async def failing() -> bool:
        raise AdapterRefused("no")

    async def work() -> ResolvedAdapter:
        return found("made")

    with book._limits.ordering(acme), book._limits.ordering(acme):
        asked = [asyncio.create_task(book.resolve(acme, key(1), work, yes)) for _ in range(5)]
        await until(lambda: num_looks > 0)
        asked[0].cancel()
        go_on.set()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError) and {one.ref.hash for one in results[1:]} == {"made"}
        assert num_looks == 1 and not book._looks
        for look in (no, failing):
            with pytest.raises(LimitReached, match="max_orders"):
                await book.resolve(acme, key(2), work, look)
    await settled(book)


def test_over_http(live, world: World) -> None:
    """Weights that change with each request leave no more packs than the tenant may keep; what others use stays."""
    world.write(RULES + "max_merges = 2\n")  # beta's
    world.settle(live)
    packs = live.folder / "store" / "packs"
    live.api.merges.idle_s = 0.5

    def ask(tenant: str, weight: float) -> str:
        merged = {"ids": [f"{tenant}/sql", "common/pirate"], "weights": [1, weight]}
        answer = world.generate(live, tenant, None, merged_adapters=merged)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-adapter-tier"]

    ask("acme", 0.25), ask("beta", 0.5)
    before = set(packs.iterdir())
    for number in range(1, 7):
        assert ask("beta", 1 + number / 10) == "source"
    wait_for(lambda: len(set(packs.iterdir()) - before) <= 2, 60)
    assert ask("acme", 0.25) != "source" and ask("beta", 1.6) != "source"
    assert ask("beta", 0.5) == "source"  # made again
    live.api.merges._kept.clear()  # as after a restart
    live.api.adapters._known = KnownAdapters()
    beta = live.api.tenancy.rules.tenant("beta")
    with ExitStack() as orders:
        for _ in range(beta.max_orders):
            orders.enter_context(live.api.tenancy.limits.ordering(beta))
        assert ask("beta", 0.5) != "source"
        merged = {"ids": ["beta/sql", "common/pirate"], "weights": [1, 7]}
        assert world.generate(live, "beta", None, merged_adapters=merged).status_code == 429

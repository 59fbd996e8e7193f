"""Which adapters this server uses, where each is in memory, and when its memory is to be freed.

Owns, by hash: the tier that the engine told, running requests, what was replaced or unloaded; by name: the hash that it last meant here and
how often it was asked for. Sends Forget when the last request of a hash that no name means any more has ended: a Forget before that would
be undone by a request that was resolved but had not reached the engine. It only ever frees memory: what a name means is not decided here.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.api.selection import NameKey
from server.errors import AdapterRefused
from server.ipc.messages import AdapterEvent, Forget, Prefetch
from server.types import AdapterRef

_MAX_REMEMBERED = 20_000  # names and hashes; an entry is small


@dataclass(frozen=True)
class Use:
    """What a name meant here when it was last asked for."""

    ref: AdapterRef
    rank: int
    base_name: str | None


@dataclass(frozen=True)
class Tier:
    """Where the engine has an adapter: "loading", "host", "device" or "failed"."""

    state: str
    bytes: int
    load_s: float
    error: str | None


class Residency:
    """All adapters of one server. For the event loop's thread alone. `tell` sends to the engine, without effect while there is none."""

    def __init__(self, tell: Callable[[Prefetch | Forget], None]) -> None:
        self._tell = tell
        self._uses: OrderedDict[NameKey, Use] = OrderedDict()
        self._num_names: Counter[str] = Counter()  # hash -> names that mean it
        self._num_requests: Counter[str] = Counter()  # hash -> requests that run with it
        self._retired: OrderedDict[str, None] = OrderedDict()  # no name means them
        self._since: dict[NameKey, tuple[int, ...]] = {}  # name -> stamps since it means something else
        self._tiers: dict[str, Tier] = {}
        self._arrivals: dict[str, asyncio.Future[None]] = {}  # hash -> the engine said that it has it, or cannot
        self._hits: OrderedDict[NameKey, int] = OrderedDict()

    # -- names --------------------------------------------------------------------------------------------------------------------

    def uses(self) -> Iterator[tuple[NameKey, Use]]:
        """Every name that was used here and still means what it meant then."""
        return iter(self._uses.items())

    def use(self, key: NameKey) -> Use | None:
        """What a name meant here when it was last asked for."""
        return self._uses.get(key)

    def resolved(self, key: NameKey, ref: AdapterRef, stamps: tuple[int, ...], rank: int, base_name: str | None) -> None:
        """A request for `key` got this adapter. `stamps` are Registry.stamps of when it asked."""
        if stamps < self._since.get(key, ()):
            self._retire(ref.hash)  # it asked before the name was changed
            return
        use = self._uses.get(key)
        if use is None or use.ref.hash != ref.hash:
            self._num_names[ref.hash] += 1
            self._retired.pop(ref.hash, None)
            self._drop(key)
        self._uses[key] = Use(ref, rank, base_name)
        self._uses.move_to_end(key)
        while len(self._uses) > _MAX_REMEMBERED:
            _, oldest = self._uses.popitem(last=False)
            self._leave(oldest.ref.hash)

    def hit(self, key: NameKey) -> None:
        """A request asked for the name."""
        self._hits[key] = self._hits.pop(key, 0) + 1
        while len(self._hits) > _MAX_REMEMBERED:
            self._hits.popitem(last=False)

    def num_hits(self, key: NameKey) -> int:
        """Requests that asked for the name since the start."""
        return self._hits.get(key, 0)

    def changed(self, key: NameKey, stamps: tuple[int, ...]) -> None:
        """The name means something else from now on."""
        self._since[key] = stamps
        self._drop(key)

    def unload(self, key: NameKey) -> None:
        """Free what the name means now, unless another name means it too; the next request for it loads it again."""
        self._drop(key)

    def abandon(self, adapter_hash: str) -> None:
        """Free it, unless a name means it: it was loaded for one that did not come to mean it, or is no longer pinned."""
        self._retire(adapter_hash)

    def _drop(self, key: NameKey) -> None:
        use = self._uses.pop(key, None)
        if use is not None and self._leave(use.ref.hash):
            self._retire(use.ref.hash)

    def _leave(self, adapter_hash: str) -> bool:
        """One name less means this hash; whether that was the last one."""
        self._num_names[adapter_hash] -= 1
        if self._num_names[adapter_hash] > 0:
            return False
        del self._num_names[adapter_hash]
        return True

    def _retire(self, adapter_hash: str) -> None:
        if adapter_hash in self._num_names:
            return
        self._retired[adapter_hash] = None
        while len(self._retired) > _MAX_REMEMBERED:
            self._retired.popitem(last=False)
        if not self._num_requests[adapter_hash]:
            self._forget(adapter_hash)

    def _forget(self, adapter_hash: str) -> None:
        self._num_requests.pop(adapter_hash, None)
        self._tell(Forget(adapter_hash))

    # -- requests -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, adapter_hash: str) -> Iterator[None]:
        """A request runs with this adapter."""
        self._num_requests[adapter_hash] += 1
        try:
            yield
        finally:
            self._num_requests[adapter_hash] -= 1
            if not self._num_requests[adapter_hash]:
                del self._num_requests[adapter_hash]
                if adapter_hash in self._retired:
                    self._forget(adapter_hash)

    def num_requests(self, adapter_hash: str) -> int:
        """Requests that run with it."""
        return self._num_requests.get(adapter_hash, 0)

    def draining(self) -> list[tuple[str, int]]:
        """Hashes that no name means any more, with the requests that still run on them."""
        return [(one, self._num_requests[one]) for one in self._retired if self._num_requests.get(one)]

    # -- the engine ---------------------------------------------------------------------------------------------------------------

    def tier(self, adapter_hash: str) -> Tier | None:
        """Where the engine has it; None: nowhere."""
        return self._tiers.get(adapter_hash)

    def tiers(self) -> Iterator[tuple[str, Tier]]:
        """Every hash that the engine has or has tried."""
        return iter(self._tiers.items())

    def take(self, event: AdapterEvent) -> None:
        """The engine moved an adapter."""
        before = self._tiers.pop(event.hash, None)
        if event.state != "absent":
            load_s = event.load_s or (before.load_s if before is not None else 0.0)
            self._tiers[event.hash] = Tier(event.state, event.bytes, load_s, event.error)
        if event.state in ("host", "device", "failed") and (arrival := self._arrivals.pop(event.hash, None)) is not None:
            arrival.set_result(None)

    def engine_started(self) -> None:
        """A new engine holds nothing."""
        self._tiers.clear()
        self._retired.clear()

    async def load(self, ref: AdapterRef, timeout_s: float) -> bool:
        """Have the engine read it; whether it has it in memory within the time. AdapterRefused if the engine cannot load it."""
        tier = self._tiers.get(ref.hash)
        if tier is None or tier.state not in ("host", "device"):
            arrival = self._arrivals.get(ref.hash)
            if arrival is None:
                arrival = self._arrivals[ref.hash] = asyncio.get_running_loop().create_future()
            self._tell(Prefetch(ref))
            await asyncio.wait({arrival}, timeout=timeout_s)
            tier = self._tiers.get(ref.hash)
        if tier is not None and tier.state == "failed":
            raise AdapterRefused(f"Adapter '{ref.name}': {tier.error or 'the engine could not load it'}")
        return tier is not None and tier.state in ("host", "device")

"""Several engines behind one API process, one a GPU. Looks like one EngineClient to its users; api.placement says who gets a request.

Owns what is known of each engine, and tells each what it must know. Knows no GPUs: an engine is what its EngineOptions say, and may one day
own several (tensor parallelism). An engine that dies fails its own requests and is started again alone. They are not tried elsewhere: a
request that kills its engine would then kill them all. Those that it never confirmed are, once: they were on their way to it when it died.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from server.api.engine import EngineClient
from server.api.open_requests import NotTaken
from server.api.placement import TIERS, Member, Place, choose
from server.errors import Overloaded, ServerError, Unavailable
from server.ipc.messages import AdapterEvent, EngineStats, Forget, Pin, Prefetch, Ready, Unpin
from server.metrics import ENGINE_COUNTERS, Metrics
from server.types import EngineOptions, EngineRequest, SequenceOutput

log = logging.getLogger(__name__)


class EngineTotals:
    """The numbers of several engines, added up. What an engine counted before it died stays in the sum, what it held does not."""

    def __init__(self) -> None:
        self._now: dict[int, dict[str, float]] = {}  # engine -> its last numbers
        self._past: Counter[str] = Counter()
        self._up: set[int] = set()

    def take(self, index: int, stats: Mapping[str, float]) -> None:
        """An engine's numbers."""
        self._now[index] = dict(stats)

    def lose(self, index: int) -> None:
        """An engine has ended; the next one counts from zero."""
        for name, value in self._now.pop(index, {}).items():
            if name in ENGINE_COUNTERS:
                self._past[name] += value

    def set_up(self, index: int, is_up: bool) -> int:
        """Whether this one answers; how many do."""
        (self._up.add if is_up else self._up.discard)(index)
        return len(self._up)

    def sums(self) -> dict[str, float]:
        """Fields of EngineStats."""
        return {name: self._past[name] + sum(one.get(name, 0) for one in self._now.values()) for name in EngineStats.__struct_fields__}


class MetricsShare:
    """The metrics as one of several engines sees them: what EngineClient uses of Metrics."""

    def __init__(self, metrics: Metrics, totals: EngineTotals, index: int) -> None:
        self._metrics, self._totals, self._index = metrics, totals, index
        self.engine_starts, self.adapter_load, self.adapter_states = metrics.engine_starts, metrics.adapter_load, metrics.adapter_states
        self.engine_up = self

    def set(self, up: bool) -> None:
        """This engine answers, or not."""
        self._metrics.engine_up.set(self._totals.set_up(self._index, bool(up)))

    def observe_engine(self, stats: Mapping[str, float]) -> None:
        """This engine's numbers."""
        self._totals.take(self._index, stats)
        self._metrics.observe_engine(self._totals.sums())

    def lose(self) -> None:
        """This engine has ended."""
        self._totals.lose(self._index)
        self._metrics.observe_engine(self._totals.sums())


class Engines:
    """EngineClient's interface over several of them; the errors of `submit` are EngineClient's.

    `on_fatal` is called when none of them could start, or when they do not serve the same base model."""

    def __init__(
        self,
        options: Sequence[EngineOptions],
        metrics: Metrics,
        *,
        max_open: int,
        on_fatal: Callable[[str], None] = lambda reason: None,
        make_client: Callable[..., EngineClient] = EngineClient,
        **client_options: Any,
    ) -> None:
        self._max_open, self._on_fatal = max_open, on_fatal
        self.on_ready: Callable[[], None] = lambda: None
        self.on_joined: Callable[[], None] = lambda: None  # one more beside others that serve
        self.on_adapter: Callable[[AdapterEvent], None] = lambda event: None
        self.members: list[Member] = []
        self._failed: dict[int, str] = {}  # engines that never started -> why
        self._pinned: dict[int, set[str]] = {index: set() for index in range(len(options))}
        self._fingerprint: str | None = None
        totals = EngineTotals()
        for index, one in enumerate(options):
            share = MetricsShare(metrics, totals, index)
            client = make_client(one, share, max_open=max_open, on_fatal=partial(self._take_failure, index), **client_options)
            client.on_ready = partial(self._take_ready, index)
            client.on_lost = partial(self._take_loss, index, share)
            client.on_adapter = partial(self._take_adapter, index)
            client.on_sick = partial(self._move_waiting, index)
            self.members.append(Member(client))

    @property
    def clients(self) -> list[EngineClient]:
        """Each engine by itself."""
        return [member.client for member in self.members]

    @property
    def ready(self) -> Ready | None:
        """What an engine that takes requests said of itself; None if there is none."""
        return next((client.ready for client in self.clients if client.ready is not None), None)

    @property
    def last_ready(self) -> Ready | None:
        """The same, also of an engine that is being started again."""
        return self.ready or next((client.last_ready for client in self.clients if client.last_ready is not None), None)

    def start(self) -> None:
        """Start all of them in the background."""
        for client in self.clients:
            client.start()

    async def wait_ready(self) -> Ready:
        """What the first that became ready said, now or soon."""
        waits = [asyncio.create_task(client.wait_ready()) for client in self.clients]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for wait in waits:
                wait.cancel()

    def unhealthy_reason(self) -> str | None:
        """None while at least one engine serves; else why they do not."""
        reasons = [member.unhealthy_reason() for member in self.members]
        return None if None in reasons else "; ".join(dict.fromkeys(reason for reason in reasons if reason is not None))

    async def stop(self) -> None:
        """Stop all of them and end open requests."""
        await asyncio.gather(*(client.stop() for client in self.clients))

    def fail_open(self, error: ServerError) -> None:
        """End every open request with `error`."""
        for client in self.clients:
            client.fail_open(error)

    def tell(self, message: Prefetch | Forget | Pin | Unpin) -> None:
        """Send what needs no answer: a prefetch to the engine that a request would go to, everything else to all. So a pin holds its
        adapter in the host memory of each, and is sent once to each."""
        if isinstance(message, Prefetch):
            if (member := choose(self.members, message.adapter.hash)) is not None:
                member.client.tell(message)
            return
        for index, client in enumerate(self.clients):
            pinned = self._pinned[index]
            if isinstance(message, Pin):
                if client.ready is None or message.adapter.hash in pinned:
                    continue
                pinned.add(message.adapter.hash)
            elif isinstance(message, Unpin):
                if message.hash not in pinned:
                    continue
                pinned.remove(message.hash)
            client.tell(message)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[SequenceOutput, None]:
        """As EngineClient.submit, on the engine that the rule says."""
        if sum(member.num_open for member in self.members) >= self._max_open:
            raise Overloaded()
        adapter_hash = None if request.adapter is None else request.adapter.hash
        member = choose(self.members, adapter_hash)
        if member is None:
            raise Unavailable(self.unhealthy_reason() or "no engine", retry_after_s=5.0)
        try:
            async with aclosing(self._submit_to(member, request, adapter_hash)) as outputs:
                async for output in outputs:
                    yield output
            return
        except NotTaken as lost:
            other = choose([one for one in self.members if one is not member], adapter_hash)
            if other is None:
                raise
            log.info("request %s goes to another engine (%s)", request.request_id, lost.message)
        async with aclosing(self._submit_to(other, request, adapter_hash)) as outputs:
            async for output in outputs:
                yield output

    async def _submit_to(self, member: Member, request: EngineRequest, adapter_hash: str | None) -> AsyncGenerator[SequenceOutput, None]:
        place = Place(member, adapter_hash, len(request.token_ids))
        try:
            async with aclosing(member.client.submit(request)) as outputs:
                async for output in outputs:
                    place.grow(len(output.token_ids))
                    yield output
        finally:
            place.leave()

    # -- what the engines say -----------------------------------------------------------------------------------------------------

    def _take_ready(self, index: int) -> None:
        member = self.members[index]
        assert member.client.ready is not None
        self._failed.pop(index, None)
        member.refusal = None
        self._fingerprint = self._fingerprint or member.client.ready.layout.fingerprint
        if member.client.ready.layout.fingerprint != self._fingerprint:
            member.refusal = "the engines do not serve the same base model"
            self._on_fatal(member.refusal)
            return
        if any(other.client.ready is not None for other in self.members if other is not member):
            self.on_joined()
        else:
            self.on_ready()

    def _take_failure(self, index: int, reason: str) -> bool:
        """It could not start, and never could before; whether to try again."""
        self._failed[index] = reason
        if len(self._failed) == len(self.members):
            self._on_fatal(reason)
            return False
        log.error("the engine on %s cannot start (%s); the others go on without it", self.clients[index].device, reason)
        return True

    def _take_loss(self, index: int, share: MetricsShare) -> None:
        """It has ended, and what it held is gone."""
        share.lose()
        self._pinned[index].clear()
        lost, self.members[index].tiers = self.members[index].tiers, {}
        for adapter_hash in lost:
            self.on_adapter(self._best(adapter_hash))

    def _move_waiting(self, index: int) -> None:
        """It has fallen silent: what it has not confirmed need not wait for its end, if another one serves."""
        if any(other.is_serving for other in self.members if other is not self.members[index]):
            self.clients[index].give_back(self.clients[index].unhealthy_reason() or "the engine is silent")

    def _take_adapter(self, index: int, event: AdapterEvent) -> None:
        tiers = self.members[index].tiers
        if event.state == "absent":
            tiers.pop(event.hash, None)
        else:
            tiers[event.hash] = event
        self.on_adapter(self._best(event.hash, event))

    def _best(self, adapter_hash: str, latest: AdapterEvent | None = None) -> AdapterEvent:
        """Where the adapter is held best: what the others know of it. Of several alike the `latest`."""
        events = [member.tiers[adapter_hash] for member in self.members if adapter_hash in member.tiers]
        absent = AdapterEvent(adapter_hash, "absent")
        return max(events, key=lambda event: (TIERS.get(event.state, 0), event is latest), default=absent)

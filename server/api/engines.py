"""Several engines behind one API process, one a GPU: each request is placed on one of them. Looks like one EngineClient to its users.

Owns the placement and what each engine holds. It does not know requests beyond what places them, nor GPUs: an engine is what its
EngineOptions say, and may one day own several (tensor parallelism). An engine that dies fails its own requests and is started again alone.

The rule: where the request's adapter is, if that engine has at most `SLACK` open sequences more than the idlest; else the idlest. So a
popular adapter is loaded on another engine as soon as its own has a queue that the others have not.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.api.engine import EngineClient
from server.errors import Overloaded, ServerError, Unavailable
from server.ipc.messages import AdapterEvent, Forget, Heartbeat, Pin, Prefetch, Ready, Unpin
from server.metrics import Metrics
from server.types import EngineOptions, EngineRequest, SequenceOutput

log = logging.getLogger(__name__)

SLACK = 8  # open sequences
_RANK = {"device": 4, "host": 3, "copying": 3, "loading": 2, "failed": 1, "absent": 0}


class _Share:
    """The metrics as one of several engines sees them: what it says is added to what the others said."""

    def __init__(self, owner: "Engines", index: int, metrics: Metrics) -> None:
        self._owner, self._index, self._metrics = owner, index, metrics
        self.engine_starts, self.adapter_load, self.adapter_states = metrics.engine_starts, metrics.adapter_load, metrics.adapter_states
        self.engine_up = self

    def set(self, up: bool) -> None:
        """This engine answers, or not."""
        self._owner.members[self._index].is_up = bool(up)
        self._metrics.engine_up.set(sum(member.is_up for member in self._owner.members))

    def observe_engine(self, stats: Mapping[str, float]) -> None:
        """This engine's numbers."""
        self._owner.members[self._index].stats = dict(stats)
        self._metrics.observe_engine(self._owner.sums())


@dataclass(eq=False)
class Member:
    """One engine, and what it is known to hold."""

    client: EngineClient
    states: dict[str, str] = field(default_factory=dict)  # adapter -> its tier on this engine
    pinned: set[str] = field(default_factory=set)
    stats: dict[str, float] = field(default_factory=dict)
    num_open: int = 0
    is_up: bool = False

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests."""
        return self.client.ready is not None and self.client.unhealthy_reason() is None


class Engines:
    """EngineClient's interface over several of them. ValueError where a method says so; errors of `submit` are EngineClient's."""

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
        self.on_adapter: Callable[[AdapterEvent], None] = lambda event: None
        self.members: list[Member] = []
        for index, one in enumerate(options):
            share = _Share(self, index, metrics)
            client = make_client(one, share, max_open=max_open, on_fatal=on_fatal, **client_options)
            self.members.append(Member(client))
        for member in self.members:
            member.client.on_ready = lambda member=member: self._take_ready(member)
            member.client.on_adapter = lambda event, member=member: self._take_adapter(member, event)

    @property
    def ready(self) -> Ready | None:
        """What an engine that takes requests said of itself; None if there is none."""
        return next((member.client.ready for member in self.members if member.client.ready is not None), None)

    @property
    def last_ready(self) -> Ready | None:
        """The same, also of an engine that is being started again."""
        return self.ready or next((member.client.last_ready for member in self.members if member.client.last_ready is not None), None)

    @property
    def stats(self) -> Heartbeat | None:
        """The last heartbeat of one of them."""
        return next((member.client.stats for member in self.members if member.client.stats is not None), None)

    def sums(self) -> dict[str, float]:
        """The engines' numbers, added up."""
        names = {name for member in self.members for name in member.stats}
        return {name: sum(member.stats.get(name, 0) for member in self.members) for name in names}

    def start(self) -> None:
        """Start all of them in the background."""
        for member in self.members:
            member.client.start()

    async def wait_ready(self) -> Ready:
        """What the first that became ready said, now or soon."""
        waits = [asyncio.create_task(member.client.wait_ready()) for member in self.members]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for wait in waits:
                wait.cancel()

    def unhealthy_reason(self) -> str | None:
        """None while at least one engine serves; else why the first does not."""
        if any(member.is_serving for member in self.members):
            return None
        return self.members[0].client.unhealthy_reason()

    async def stop(self) -> None:
        """Stop all of them and end open requests."""
        await asyncio.gather(*(member.client.stop() for member in self.members))

    def fail_open(self, error: ServerError) -> None:
        """End every open request with `error`."""
        for member in self.members:
            member.client.fail_open(error)

    def tell(self, message: Prefetch | Forget | Pin | Unpin) -> None:
        """Send what needs no answer: a prefetch to where it would be placed, everything else to every engine. A pin holds the adapter on
        every engine; the same pin twice is one."""
        if isinstance(message, Prefetch):
            if (member := self._choose(message.adapter.hash)) is not None:
                member.client.tell(message)
            return
        for member in self.members:
            if isinstance(message, Pin):
                if member.client.ready is None or message.adapter.hash in member.pinned:
                    continue
                member.pinned.add(message.adapter.hash)
            elif isinstance(message, Unpin):
                if message.hash not in member.pinned:
                    continue
                member.pinned.discard(message.hash)
            member.client.tell(message)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[SequenceOutput, None]:
        """As EngineClient.submit, on the engine that the rule says."""
        if sum(member.num_open for member in self.members) >= self._max_open:
            raise Overloaded()
        member = self._choose("" if request.adapter is None else request.adapter.hash)
        if member is None:
            raise Unavailable(self.unhealthy_reason() or "no engine", retry_after_s=5.0)
        member.num_open += 1
        outputs = member.client.submit(request)
        try:
            async for output in outputs:
                yield output
        finally:
            member.num_open -= 1
            await outputs.aclose()

    def _choose(self, adapter_hash: str) -> Member | None:
        """Where a request goes; None if no engine takes requests."""
        serving = [member for member in self.members if member.is_serving]
        if not serving:
            return None
        least = min(member.num_open for member in serving)
        near = [member for member in serving if member.num_open <= least + SLACK]
        return min(near, key=lambda member: (-_RANK[_held(member, adapter_hash)], member.num_open))

    def _take_ready(self, member: Member) -> None:
        member.states.clear()
        member.pinned.clear()
        layouts = {one.client.ready.layout.fingerprint for one in self.members if one.client.ready is not None}
        if len(layouts) > 1:
            self._on_fatal("the engines do not serve the same base model")
        self.on_ready()  # which forgets where adapters are, since an engine alone starts with none
        for adapter_hash in {key for one in self.members for key in one.states}:
            self.on_adapter(AdapterEvent(adapter_hash, self._best(adapter_hash)))

    def _take_adapter(self, member: Member, event: AdapterEvent) -> None:
        if event.state == "absent":
            member.states.pop(event.hash, None)
        else:
            member.states[event.hash] = event.state
        best = self._best(event.hash)
        if best == event.state or _RANK[event.state] < _RANK[best]:
            # What the others know of an adapter is where it is best held.
            self.on_adapter(event if best == event.state else AdapterEvent(event.hash, best, event.bytes))

    def _best(self, adapter_hash: str) -> str:
        return max((_held(one, adapter_hash) for one in self.members), key=_RANK.__getitem__)


def _held(member: Member, adapter_hash: str) -> str:
    state = member.states.get(adapter_hash, "absent")
    return state if state in _RANK else "absent"

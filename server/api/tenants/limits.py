"""How much a tenant, and each adapter, may have at once: requests in flight, requests that wait, tokens a minute, the length of an answer;
and a tenant's orders about adapters.

Owns the counts of this server and the words of each refusal, which name the limit. In flight and waiting are counted here alone; the
tokens of the last minute are the whole fleet's (`usage`). What a request may still generate is taken when it is submitted and given back
when it ends, so that a minute's tokens are never overrun by what runs. For the event loop's thread; `api.state` asks for each request.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from server.api.names import shown
from server.api.sampling import refuse
from server.api.selection import AdapterSelection
from server.api.tenants.rules import Limits, Shared, Spelling, Tenant
from server.api.tenants.usage import WINDOW_S, Window
from server.errors import LimitReached


@dataclass(frozen=True)
class Scope:
    """Something that is limited: `key` counts it, `what` names it to its caller."""

    key: str
    what: str
    limits: Limits


def scopes_of(
    tenant: Tenant, shared: Shared, selection: AdapterSelection | None, shared_ids: Collection[str], spelling: Spelling = str
) -> list[Scope]:
    """All that a request counts for: its tenant, its adapters as the tenant limits them, shared adapters as they are limited for all.

    The selection's ids are as they are kept; `shared_ids` are those that every tenant may call, merged with others or not. `spelling`: how
    an id of the selection's source is kept, for the ids in the tenants file."""
    found = [Scope(f"tenant/{tenant.name}", "the tenant", tenant.limits)]
    for kept in dict.fromkeys(selection.ids if selection is not None else ()):
        assert selection is not None
        name = shown(kept)
        key = f"adapter/{tenant.name}/{selection.source}/{kept}"
        found.append(Scope(key, f"adapter '{name[:256]}'", tenant.rules.limits_of(name, selection.source, spelling)))
        if kept in shared_ids:
            limits = shared.limits_of(name, selection.source, spelling)
            found.append(Scope(f"shared/{selection.source}/{kept}", f"adapter '{name[:256]}' for all tenants", limits))
    return [scope for scope in found if scope.limits != Limits()]


class Request(Protocol):
    """What is asked of a request while it runs."""

    @property
    def is_waiting(self) -> bool:
        """It has no token yet."""
        ...

    @property
    def num_used_tokens(self) -> int:
        """Read and generated so far."""
        ...


@dataclass(eq=False)
class Lease:
    """What one request holds of its limits until it ends. `request`, `book`: None where nothing of it is limited."""

    scopes: list[Scope]
    num_sequences: int
    request: Request | None = None
    book: "LimitBook | None" = None
    num_taken: int = 0
    taken_at: float = 0.0

    @property
    def is_waiting(self) -> bool:
        """It has no token yet."""
        return self.request is not None and self.request.is_waiting

    @property
    def output_bound(self) -> int | None:
        """Tokens of its longest answer; None: no bound."""
        bounds = [scope.limits.output_tokens for scope in self.scopes if scope.limits.output_tokens is not None]
        return min(bounds, default=None)

    def check_output(self, asked: int | None, name: str) -> None:
        """ValidationFailed if the request asks for a longer answer than it may have."""
        for scope in self.scopes:
            bound = scope.limits.output_tokens
            if asked is not None and bound is not None and asked > bound:
                raise refuse(f"`{name}` must be <= {bound}, the limit `output_tokens` of {scope.what}. Given: {asked}", name)

    def bounded(self, rooms: list[int]) -> list[int]:
        """The longest answer of each prompt, cut to the bound."""
        bound = self.output_bound
        return rooms if bound is None else [min(room, bound) for room in rooms]

    def take(self, num_tokens: int) -> None:
        """Count the tokens that the request reads and may generate. LimitReached if they are too many now."""
        if self.book is not None:
            self.book.take(self, num_tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's headers about the tenant's tokens; none without such a limit."""
        return self.book.headers(self.scopes) if self.book is not None else {}


class LimitBook:
    """All counts of one server. `others`: tokens that the fleet's other servers used in the last minute, by scope."""

    def __init__(self, *, on_refused: Callable[[str], None] = lambda limit: None, clock: Callable[[], float] = time.monotonic) -> None:
        self.others: dict[str, int] = {}
        self._open: dict[str, set[Lease]] = {}
        self._orders: dict[str, Counter[object]] = {}  # tenant -> what is ordered -> for how many
        self._windows: dict[str, Window] = {}
        self._on_refused, self._clock = on_refused, clock

    def used(self) -> dict[str, int]:
        """Tokens that this server used in the last minute, by scope, for the others."""
        now = self._clock()
        self._windows = {key: window for key, window in self._windows.items() if window.used(now)}
        return {key: window.used(now) for key, window in self._windows.items()}

    @contextmanager
    def admitted(self, scopes: list[Scope], num_sequences: int, request: Request | None) -> Iterator[Lease]:
        """Hold places for `num_sequences`. LimitReached, naming the limit, if there are none."""
        for scope in scopes:
            self._check(scope, num_sequences)
        lease = Lease(scopes, num_sequences, request, self)
        for scope in scopes:
            self._open.setdefault(scope.key, set()).add(lease)
        try:
            yield lease
        finally:
            for scope in scopes:
                self._open[scope.key].discard(lease)
                if not self._open[scope.key]:
                    del self._open[scope.key]
            self._give_back(lease)

    @contextmanager
    def ordering(self, tenant: Tenant, what: object = None) -> Iterator[None]:
        """Hold a place for an order about adapters; one for all that order the same, if `what` it is is said. LimitReached, naming
        `max_orders`, if there is none."""
        held, what = self._orders.setdefault(tenant.name, Counter()), object() if what is None else what
        if what not in held and len(held) >= tenant.max_orders:
            raise self._reached("max_orders", Scope(f"tenant/{tenant.name}", "the tenant", tenant.limits), tenant.max_orders, 1.0)
        held[what] += 1
        try:
            yield
        finally:
            held[what] -= 1
            if not held[what]:
                del held[what]
            if not held:
                self._orders.pop(tenant.name, None)

    def _check(self, scope: Scope, num_sequences: int) -> None:
        limits, leases = scope.limits, self._open.get(scope.key, ())
        if (most := limits.requests_in_flight) is not None and sum(one.num_sequences for one in leases) + num_sequences > most:
            raise self._reached("requests_in_flight", scope, most, 1.0)
        if (most := limits.queue_length) is not None:
            num_waiting = sum(one.num_sequences for one in leases if one.is_waiting)
            if num_waiting + num_sequences > most:
                raise self._reached("queue_length", scope, most, 1.0)
        if limits.tokens_a_minute is not None:
            self._check_tokens(scope, limits.tokens_a_minute, 1)

    def take(self, lease: Lease, num_tokens: int) -> None:
        """See Lease.take. A request that is larger than the limit itself passes when nothing else was used for a minute."""
        counted = [(scope, most) for scope in lease.scopes if (most := scope.limits.tokens_a_minute) is not None]
        for scope, most in counted:
            self._check_tokens(scope, most, num_tokens)
        lease.num_taken, lease.taken_at = num_tokens, self._clock()
        for scope, _ in counted:
            self._windows.setdefault(scope.key, Window()).add(num_tokens, lease.taken_at)

    def _give_back(self, lease: Lease) -> None:
        num_used = lease.request.num_used_tokens if lease.request is not None else 0
        for scope in lease.scopes:
            if lease.num_taken and scope.key in self._windows and scope.limits.tokens_a_minute is not None:
                self._windows[scope.key].give_back(lease.num_taken - num_used, lease.taken_at)

    def _check_tokens(self, scope: Scope, most: int, num_tokens: int) -> None:
        excess = sum(self._used(scope)) + min(num_tokens, most) - most
        if excess > 0:
            raise self._reached("tokens_a_minute", scope, most, self._wait_s(scope, excess))

    def _used(self, scope: Scope) -> tuple[int, int]:
        """Tokens of the last minute: this server's and the others'."""
        window = self._windows.get(scope.key)
        return window.used(self._clock()) if window is not None else 0, self.others.get(scope.key, 0)

    def _wait_s(self, scope: Scope, num_tokens: int) -> float:
        """Seconds until so many of the used tokens are a minute old; the others' as if they had come evenly."""
        own, others = self._used(scope)
        if others:
            return WINDOW_S * min(1.0, num_tokens / (own + others))
        return self._windows[scope.key].wait_s(num_tokens, self._clock()) if own else 0.0

    def _reached(self, limit: str, scope: Scope, most: int, wait_s: float) -> LimitReached:
        self._on_refused(limit)
        wait_s = max(1, math.ceil(wait_s))
        error = LimitReached(f"limit `{limit}` of {scope.what} is reached ({most}); try again in {wait_s} s", retry_after_s=wait_s)
        error.headers = {"x-manylora-limit": limit} | (self.headers([scope]) if limit == "tokens_a_minute" else {})
        return error

    def headers(self, scopes: list[Scope]) -> dict[str, str]:
        """OpenAI's headers about tokens a minute, of the first scope that has such a limit: the tenant's, if it has one."""
        limited = next(((scope, most) for scope in scopes if (most := scope.limits.tokens_a_minute) is not None), None)
        if limited is None:
            return {}
        scope, most = limited
        used = sum(self._used(scope))
        return {
            "x-ratelimit-limit-tokens": str(most),
            "x-ratelimit-remaining-tokens": str(max(0, most - used)),
            "x-ratelimit-reset-tokens": f"{math.ceil(self._wait_s(scope, used))}s",
        }

"""Which of several engines gets a request: what each holds and has to do, and the rule. api.engines calls it; it knows no GPUs.

The rule: the engine that has the request's adapter, as long as it is at most SLACK_TOKENS busier than the idlest; beyond that, the idlest.
So an adapter is in the memory of one engine while that keeps up, and a popular one is loaded on another as soon as its own engine has a
queue that the other has not. An engine is as busy as the tokens of its open sequences, queued and running, each sequence counted as at
least SEQUENCE_TOKENS: however short, it takes a row of every step. Among equally busy ones an adapter that is nowhere goes to where the
fewest are, and the base always to the first, whose prefix cache then has seen most.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.api.engine import EngineClient
from server.ipc.messages import AdapterEvent

SEQUENCE_TOKENS = 128
SLACK_TOKENS = 1024  # about a step of prefill, or eight short sequences: less than it takes to load an adapter elsewhere
# Best first. A failed load is worth nothing to a request, but more to whoever asks what became of it.
TIERS = {"device": 4, "copying": 3, "host": 3, "loading": 2, "failed": 1, "absent": 0}


@dataclass(eq=False)
class Member:
    """One engine as placement sees it."""

    client: EngineClient
    tiers: dict[str, AdapterEvent] = field(default_factory=dict)  # adapter's hash -> what the engine last said of it, unless absent
    num_open: int = 0  # sequences
    num_tokens: int = 0  # of the open sequences, as the rule counts them
    adapters: Counter[str] = field(default_factory=Counter)  # hash -> open sequences
    refusal: str | None = None  # why it may not serve, though it could

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests."""
        return self.client.ready is not None and self.unhealthy_reason() is None

    def unhealthy_reason(self) -> str | None:
        """As EngineClient's."""
        return self.refusal or self.client.unhealthy_reason()

    def closeness(self, adapter_hash: str) -> int:
        """How near the adapter is to its device. An open request brings it: no event says so yet when the next request comes."""
        event = self.tiers.get(adapter_hash)
        held = TIERS.get(event.state, 0) if event is not None else 0
        return held if held >= TIERS["loading"] else TIERS["loading"] if self.adapters.get(adapter_hash) else 0


class Place:
    """An open sequence on an engine, from when it is placed until `leave`."""

    def __init__(self, member: Member, adapter_hash: str | None, prompt_len: int) -> None:
        self._member, self._hash, self._sequence_len, self._counted = member, adapter_hash, prompt_len, 0
        member.num_open += 1
        if adapter_hash is not None:
            member.adapters[adapter_hash] += 1
        self.grow(0)

    def grow(self, num_tokens: int) -> None:
        """So many more were generated."""
        self._sequence_len += num_tokens
        counted = max(SEQUENCE_TOKENS, self._sequence_len)
        self._member.num_tokens += counted - self._counted
        self._counted = counted

    def leave(self) -> None:
        """It has ended, however."""
        self._member.num_open -= 1
        self._member.num_tokens -= self._counted
        if self._hash is not None:
            self._member.adapters[self._hash] -= 1
            if not self._member.adapters[self._hash]:
                del self._member.adapters[self._hash]


def choose(members: Sequence[Member], adapter_hash: str | None) -> Member | None:
    """Where a request for this adapter (None: the base) goes; None if no engine takes requests."""
    serving = [member for member in members if member.is_serving]
    if not serving:
        return None
    if adapter_hash is None:
        return min(serving, key=lambda member: member.num_tokens)
    least = min(member.num_tokens for member in serving)
    near = [member for member in serving if member.num_tokens <= least + SLACK_TOKENS]
    closest = max(member.closeness(adapter_hash) for member in near)
    if closest == 0:
        return min(near, key=lambda member: (member.num_tokens, len(member.tiers) + len(member.adapters)))
    return min((member for member in near if member.closeness(adapter_hash) == closest), key=lambda member: member.num_tokens)

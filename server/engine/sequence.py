"""A request as the engine sees it: tokens, how far they are computed, which blocks hold them. No torch, no policy."""

import time
from collections import Counter

from server.memory.blocks import chain_hash, root_hash
from server.types import EngineRequest, Logprob


class Sequence:
    """One prompt and what has been generated after it. Owned by the scheduler; the sampler reads it."""

    __slots__ = (
        "adapter_hash",
        "arrived_at",
        "blocks",
        "hashes",
        "num_cached",
        "num_computed",
        "num_published",
        "order",
        "output_counts",
        "prompt_len",
        "prompt_logprobs",
        "refused_at",
        "request",
        "seen",
        "started_at",
        "tokens",
    )

    def __init__(self, request: EngineRequest, order: int, base_revision: str) -> None:
        self.request = request
        self.order = order  # of arrival; a preempted sequence keeps it
        self.adapter_hash = "" if request.adapter is None else request.adapter.hash
        self.tokens = list(request.token_ids)
        self.prompt_len = len(self.tokens)
        self.num_computed = 0  # tokens whose keys and values are in `blocks`
        self.num_cached = 0  # prompt tokens that the prefix cache gave at the first admission
        self.blocks: list[int] = []
        self.hashes = [root_hash(base_revision, self.adapter_hash, request.cache_salt)]  # root, then one a full block
        self.num_published = 0
        self.arrived_at = time.monotonic()
        self.started_at: float | None = None
        self.refused_at: float | None = None  # since when its adapter finds no room on the device
        params = request.params
        self.prompt_logprobs: list[Logprob | None] | None = None if params.num_prompt_logprobs < 0 else [None] * self.prompt_len
        # What penalties look at, kept as tokens come rather than counted anew each step.
        self.output_counts: Counter[int] = Counter()
        self.seen: dict[int, None] = dict.fromkeys(self.tokens) if params.repetition_penalty != 1.0 else {}  # prompt and output

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens that wait to be computed: 1 while decoding, more while the prompt (or what preemption dropped) is read."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> None:
        """A generated token."""
        self.tokens.append(token)
        self.output_counts[token] += 1
        if self.request.params.repetition_penalty != 1.0:
            self.seen[token] = None

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first `num_blocks` full blocks."""
        while len(self.hashes) <= num_blocks:
            start = (len(self.hashes) - 1) * block_size
            self.hashes.append(chain_hash(self.hashes[-1], self.tokens[start : start + block_size]))
        return self.hashes[1 : num_blocks + 1]

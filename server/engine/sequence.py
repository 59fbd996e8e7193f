"""A request as the engine sees it: tokens, how far they are computed, which blocks hold them. No torch, no policy."""

from collections import Counter
from typing import Any

from server.engine.grammar import Matcher
from server.memory.blocks import BlockPool, chain_hash, root_hash
from server.types import EngineRequest, Logprob, SamplingParams

UNKNOWN = -1  # in place of a token that the device has drawn, or is about to draw, and the host has not read yet


class Sequence:
    """One prompt and what has been generated after it. Owned by the scheduler; the sampler reads it."""

    __slots__ = (
        "adapter_hash",
        "arrived_at",
        "blocks",
        "hashes",
        "is_queued",
        "line",
        "matcher",
        "max_len",
        "needs_host",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_places",
        "num_published",
        "num_unknown",
        "order",
        "output_counts",
        "prompt_len",
        "prompt_logprobs",
        "request",
        "seen",
        "start_order",
        "started_at",
        "table",
        "tokens",
        "work",
    )

    def __init__(self, request: EngineRequest, order: int, base_revision: str, matcher: Matcher | None = None, now: float = 0.0) -> None:
        """`now`: monotonic seconds."""
        self.request = request
        self.order = order  # of arrival
        self.adapter_hash = "" if request.adapter is None else request.adapter.hash
        self.tokens = list(request.token_ids)
        self.prompt_len = len(self.tokens)
        self.max_len = self.prompt_len + request.params.max_new_tokens
        self.num_computed = 0  # tokens whose keys and values are in `blocks`
        self.num_cached = 0  # prompt tokens that the prefix cache gave at the first admission
        self.num_unknown = 0  # tokens at the end that are UNKNOWN yet
        self.blocks: list[int] = []
        self.num_places = 0  # tokens that `blocks` hold
        self.table: Any = None  # the runner's copy of `blocks` as an array; None once they are others
        self.hashes = [root_hash(base_revision, self.adapter_hash, request.cache_salt)]  # root, then one a full block
        self.num_published = 0
        self.arrived_at = now
        self.started_at: float | None = None
        self.start_order: int | None = None  # of first starts; a preempted sequence keeps it
        self.work = 0.0  # what it is likely to take, see engine.waits
        self.is_queued = False  # in the waiting queue, whose bookkeeping the next two are
        self.line: Any = None
        self.num_charged = 0  # prompt tokens that its tenant was charged for, or had from the prefix cache
        params = request.params
        self.prompt_logprobs: list[Logprob | None] | None = None if params.num_prompt_logprobs < 0 else [None] * self.prompt_len
        self.matcher = matcher  # of a request with a grammar
        self.needs_host = _needs_host(params)  # its next step needs what the last one brought, on the host
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

    @property
    def is_ending(self) -> bool:
        """Whether the last token that it may have is drawn or being drawn."""
        return len(self.tokens) >= self.max_len

    def hold(self, blocks: list[int], block_size: int) -> None:
        """These are its blocks now."""
        self.blocks, self.table, self.num_places = blocks, None, len(blocks) * block_size

    def expect(self) -> None:
        """A token is being drawn."""
        self.tokens.append(UNKNOWN)
        self.num_unknown += 1

    def learn(self, token: int) -> None:
        """The first of the tokens that were being drawn."""
        self.tokens[-self.num_unknown] = token
        self.num_unknown -= 1
        if self.needs_host:
            self.output_counts[token] += 1
            if self.request.params.repetition_penalty != 1.0:
                self.seen[token] = None

    def publish_to(self, pool: BlockPool) -> None:
        """Name the blocks that are full of known tokens, so that others find them."""
        num_full = min(self.num_computed, len(self.tokens) - self.num_unknown) // pool.block_size
        if num_full > self.num_published:
            hashes = self.block_hashes(num_full, pool.block_size)
            for index in range(self.num_published, num_full):
                pool.publish(self.blocks[index], hashes[index])
            self.num_published = num_full

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first `num_blocks` full blocks."""
        while len(self.hashes) <= num_blocks:
            start = (len(self.hashes) - 1) * block_size
            self.hashes.append(chain_hash(self.hashes[-1], self.tokens[start : start + block_size]))
        return self.hashes[1 : num_blocks + 1]


def check_request(request: EngineRequest, max_sequence_len: int) -> None:
    """ValueError if the request could never run."""
    needed = len(request.token_ids) + request.params.max_new_tokens
    if not request.token_ids or request.params.max_new_tokens < 1:
        raise ValueError("a request has at least one token, and asks for at least one")
    if needed > max_sequence_len:
        raise ValueError(f"{needed} tokens do not fit; a sequence has at most {max_sequence_len}")
    if min(request.token_ids) < 0 or max(request.token_ids) >= 1 << 31:
        raise ValueError("token ids are whole numbers from 0")


def _needs_host(params: SamplingParams) -> bool:
    """Whether more than the token must come back from a step before the next can be drawn, or be answered."""
    penalties = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty or params.logit_bias
    return bool(penalties) or params.grammar is not None or params.num_logprobs >= 0 or params.num_prompt_logprobs >= 0

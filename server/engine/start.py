"""What a sequence's first chunk would take of the KV blocks. The scheduler asks before it starts one; nothing is changed here."""

from dataclasses import dataclass

from server.engine.chunk import longest_chunk
from server.engine.sequence import Sequence
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers


@dataclass(frozen=True, slots=True)
class Start:
    """`reuse`: blocks of the prefix cache; `num_tokens` are computed then, in `num_blocks` more."""

    reuse: list[int]
    num_tokens: int
    num_blocks: int


class Starts:
    """Finds starts in a pool. `shares_memory`: adapters lie in it, so that an idle one can make room for tokens."""

    def __init__(self, pool: BlockPool, tiers: AdapterTiers, *, prefix_caching: bool, shares_memory: bool) -> None:
        self._pool, self._tiers = pool, tiers
        self._prefix_caching, self._shares_memory = prefix_caching, shares_memory

    def find(self, sequence: Sequence, budget: int, reserve: int) -> Start | None:
        """Within `budget` tokens; None if that would leave fewer than `reserve` blocks free."""
        size = self._pool.block_size
        reuse: list[int] = []
        if self._prefix_caching and sequence.prompt_logprobs is None:
            # The last token is always computed: its logits are what the step is for.
            reuse = self._pool.match(sequence.block_hashes((len(sequence.tokens) - 1) // size, size))
        num_computed = len(reuse) * size
        num_tokens = min(len(sequence.tokens) - num_computed, longest_chunk(sequence), budget)
        num_blocks = -(-(num_computed + num_tokens) // size) - len(reuse)
        while not self._pool.can_allocate(num_blocks + reserve, reuse):
            if not (self._shares_memory and self._tiers.yield_room(keep=sequence.adapter_hash)):
                return None
        return Start(reuse, num_tokens, num_blocks)

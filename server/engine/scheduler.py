"""Which sequences get how many tokens in the next step. Host bookkeeping alone: no torch, no sockets, no clock but for waiting times.

One budget of tokens a step holds decode rows and prefill chunks together (vLLM v1's `{request: tokens}`). Decode rows come first, so a long
prompt never delays them. Two resources are admitted together: KV blocks, over-committed and won back by preempting the youngest, which
is computed again later; and adapters, pinned on the device while a sequence runs.
"""

import heapq
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.engine.chunk import Chunk, longest_chunk
from server.engine.failures import cannot_be_pinned
from server.engine.grammar import Matcher
from server.engine.sequence import Sequence
from server.errors import GenerationFailed
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers
from server.types import EngineRequest

log = logging.getLogger(__name__)

NOT_HERE = ("absent", "loading", "copying")  # states of an adapter whose arrival the tiers will tell


@dataclass(frozen=True, slots=True)
class _Start:
    """What a sequence's first chunk would take."""

    reuse: list[int]
    num_tokens: int
    num_blocks: int


class Scheduler:
    """Queued and running sequences. A step is `schedule`, `advance` for each chunk once it is launched, and `publish` once its tokens are
    known, which may be after the next `schedule`; `add` and `remove` may come between."""

    # A sequence whose adapter finds no room on the device may be overtaken for so long; then no other adapter's sequence passes it.
    MAX_OVERTAKEN_S = 2.0
    MAX_LOOKED_PAST = 64  # waiting sequences that one step passes over, so that its cost does not grow with the queue

    def __init__(
        self,
        pool: BlockPool,
        tiers: AdapterTiers,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        max_sequence_len: int | None = None,
        prefix_caching: bool = True,
        base_revision: str = "",
        vocab_size: Callable[[str], int] | None = None,
        shares_memory: bool = False,
    ) -> None:
        """`vocab_size(adapter hash, or "" for the base)`: how many ids its rows may hold; adapters' are asked when pinned.
        `shares_memory`: adapters lie in the pool's blocks, so that an idle one can make room for tokens."""
        self.pool, self.tiers = pool, tiers
        self.max_batch_tokens, self.max_batch_size = max_batch_tokens, max_batch_size
        capacity = pool.num_blocks * pool.block_size
        self.max_sequence_len = min(max_sequence_len or capacity, capacity)
        self.prefix_caching, self.base_revision = prefix_caching, base_revision
        self._vocab_size, self._shares_memory = vocab_size, shares_memory
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, Sequence]] = []  # a heap by order of arrival; removed sequences are skipped when they come up
        self._parked: dict[str, list[Sequence]] = {}  # adapter -> sequences that wait for it to be read
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[tuple[Sequence, Exception]] = []
        self._next_order = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued, those that wait for their adapter included."""
        return len(self._sequences) - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to return."""
        while self._waiting and not self.holds(self._waiting[0][1]):
            heapq.heappop(self._waiting)
        return bool(self.running or self._waiting or self._failed)

    @property
    def sequences(self) -> Mapping[str, Sequence]:
        """All that are queued or running, by request id."""
        return self._sequences

    def add(self, request: EngineRequest, matcher: Matcher | None = None) -> None:
        """Queue a request and start to bring its adapter. ValueError if it could never run; KeyError if its id is in use."""
        if request.request_id in self._sequences:
            raise KeyError(request.request_id)
        needed = len(request.token_ids) + request.params.max_new_tokens
        if not request.token_ids or request.params.max_new_tokens < 1:
            raise ValueError("a request has at least one token, and asks for at least one")
        if needed > self.max_sequence_len:
            raise ValueError(f"{needed} tokens do not fit; a sequence has at most {self.max_sequence_len}")
        if min(request.token_ids) < 0 or max(request.token_ids) >= 1 << 31:
            raise ValueError("token ids are whole numbers from 0")
        if request.adapter is None:
            self._check_vocabulary(request, "")
        sequence = Sequence(request, self._next_order, self.base_revision, matcher)
        self._next_order += 1
        self._sequences[request.request_id] = sequence
        if request.adapter is not None:
            self.tiers.want(request.adapter)
        self._enqueue(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a sequence, running or not, and free all that it holds; None if it is not here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        if sequence in self.running:
            self._stop_running(sequence)
        parked = self._parked.get(sequence.adapter_hash)
        if parked is not None and sequence in parked:
            parked.remove(sequence)
            if not parked:
                del self._parked[sequence.adapter_hash]
        if sequence.adapter_hash:
            self.tiers.unwant(sequence.adapter_hash)
        return sequence

    def collect_failed(self) -> list[tuple[Sequence, Exception]]:
        """Let those run whose adapter has arrived; returns the sequences whose adapter cannot be had, removed, with the reason."""
        arrived, failed = self.tiers.poll()
        for adapter_hash in arrived:
            for sequence in self._parked.pop(adapter_hash, ()):
                heapq.heappush(self._waiting, (sequence.order, sequence))
        for adapter_hash, error in failed:
            for sequence in list(self._parked.get(adapter_hash, ())):
                self._fail(sequence, error)
        found, self._failed = self._failed, []
        return found

    def schedule(self) -> list[Chunk]:
        """The next step: at most one chunk a sequence, `max_batch_tokens` in all. Empty if nothing can run now."""
        chunks: list[Chunk] = []
        scheduled: set[Sequence] = set()
        budget = self.max_batch_tokens
        num_preemptions = self.num_preemptions
        for decoding in (True, False):
            for sequence in [s for s in self.running if (s.num_pending == 1) == decoding and not s.is_ending]:
                num_tokens = min(longest_chunk(sequence), budget)
                # One that was preempted for another of this step holds no blocks any more, and waits.
                if num_tokens > 0 and sequence.blocks and self._grow(sequence, num_tokens, scheduled):
                    chunks.append(Chunk(sequence, num_tokens, num_tokens == sequence.num_pending))
                    scheduled.add(sequence)
                    budget -= num_tokens
        if self.num_preemptions == num_preemptions:
            self._admit(chunks, budget)
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """The chunk's step is launched: its tokens are in the cache for whatever is launched later."""
        chunk.sequence.num_computed += chunk.num_tokens
        if chunk.samples:
            chunk.sequence.expect()

    def publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full of known tokens."""
        if self.prefix_caching:
            sequence.publish_to(self.pool)

    def holds(self, sequence: Sequence) -> bool:
        """Whether this very sequence is queued or running."""
        return self._sequences.get(sequence.request.request_id) is sequence

    def _check_vocabulary(self, request: EngineRequest, adapter_hash: str) -> None:
        if self._vocab_size is not None and max(request.token_ids) >= self._vocab_size(adapter_hash):
            raise ValueError(f"token id {max(request.token_ids)} is not in the vocabulary of {self._vocab_size(adapter_hash)}")

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.remove(sequence.request.request_id)
        self._failed.append((sequence, error))

    def _enqueue(self, sequence: Sequence) -> None:
        if sequence.adapter_hash and self.tiers.state(sequence.adapter_hash) in NOT_HERE:
            self._parked.setdefault(sequence.adapter_hash, []).append(sequence)
        else:
            heapq.heappush(self._waiting, (sequence.order, sequence))

    def _grow(self, sequence: Sequence, num_tokens: int, scheduled: set[Sequence]) -> bool:
        """Blocks for the sequence's next tokens; preempts the youngest sequences that are not in this step, itself at the last."""
        missing = -(-(sequence.num_computed + num_tokens) // self.pool.block_size) - len(sequence.blocks)
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                sequence.blocks += blocks
                return True
            if self._shares_memory and self.tiers.yield_room():
                continue
            victim = max((s for s in self.running if s not in scheduled), key=lambda s: s.order)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.num_computed = sequence.num_published = 0
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.table = [], None
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.adapter_hash:
            self.tiers.release(sequence.adapter_hash)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Start waiting sequences in order of arrival. One whose adapter finds no room is passed by others, but not for ever."""
        passed: list[tuple[int, Sequence]] = []
        no_more_adapters = False
        num_rows = sum(not sequence.is_ending for sequence in self.running)
        while self._waiting and budget > 0 and num_rows < self.max_batch_size and len(passed) < self.MAX_LOOKED_PAST:
            item = heapq.heappop(self._waiting)
            sequence = item[1]
            if not self.holds(sequence):
                continue
            if sequence.num_unknown or (sequence.adapter_hash and no_more_adapters):
                passed.append(item)
                continue
            start = self._find_start(sequence, budget)
            if start is None:  # no blocks: nobody younger may take what the oldest waits for
                passed.append(item)
                break
            try:
                has_adapter = not sequence.adapter_hash or self._acquire(sequence)
            except Exception as error:
                log.warning("request %s: its adapter cannot be used (%s)", sequence.request.request_id, error)
                self._fail(sequence, cannot_be_pinned(error))
                continue
            # The adapter may have taken blocks that `start` counts on.
            if has_adapter and self._shares_memory and (start := self._find_start(sequence, budget)) is None:
                self._release(sequence)
                passed.append(item)
                break
            if has_adapter:
                self._start(sequence, start)
                chunks.append(Chunk(sequence, start.num_tokens, start.num_tokens == sequence.num_pending))
                budget -= start.num_tokens
                num_rows += 1
            elif self.tiers.state(sequence.adapter_hash) in NOT_HERE:  # it left while the sequence was out, or is just on its way
                self._parked.setdefault(sequence.adapter_hash, []).append(sequence)
            else:
                passed.append(item)
                sequence.refused_at = sequence.refused_at or time.monotonic()
                no_more_adapters = time.monotonic() - sequence.refused_at > self.MAX_OVERTAKEN_S
        for item in passed:
            heapq.heappush(self._waiting, item)

    def _acquire(self, sequence: Sequence) -> bool:
        """Pin the sequence's adapter. GenerationFailed if its tokens are not the adapter's."""
        if not self.tiers.acquire(sequence.adapter_hash):
            return False
        try:
            self._check_vocabulary(sequence.request, sequence.adapter_hash)
        except ValueError as error:
            self._release(sequence)
            raise GenerationFailed(str(error)) from None
        return True

    def _find_start(self, sequence: Sequence, budget: int) -> _Start | None:
        """What the sequence's first chunk takes; None if there is no room."""
        size = self.pool.block_size
        reuse: list[int] = []
        if self.prefix_caching and sequence.prompt_logprobs is None:
            # The last token is always computed: its logits are what the step is for.
            reuse = self.pool.match(sequence.block_hashes((len(sequence.tokens) - 1) // size, size))
        num_computed = len(reuse) * size
        num_tokens = min(len(sequence.tokens) - num_computed, longest_chunk(sequence), budget)
        num_blocks = -(-(num_computed + num_tokens) // size) - len(reuse)
        # Room for the next token of those who run, so that the newcomer does not push them out at once.
        reserve = len(self.running)
        while not self.pool.can_allocate(num_blocks + reserve, reuse):
            if not (self._shares_memory and self.tiers.yield_room(keep=sequence.adapter_hash)):
                return None
        return _Start(reuse, num_tokens, num_blocks)

    def _start(self, sequence: Sequence, start: _Start) -> None:
        blocks = self.pool.allocate(start.num_blocks, start.reuse)
        assert blocks is not None, "_find_start said that there is room"
        sequence.blocks = blocks
        sequence.num_published = len(start.reuse)
        sequence.num_computed = len(start.reuse) * self.pool.block_size
        sequence.refused_at = None
        if sequence.started_at is None:
            sequence.started_at = time.monotonic()
            sequence.num_cached = sequence.num_computed
            self.num_cached_tokens += sequence.num_computed
        self.running.append(sequence)

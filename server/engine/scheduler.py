"""Which sequences get how many tokens in the next step. Host bookkeeping alone: no torch, no sockets, no clock but for waiting times.

One budget of tokens a step holds decode rows and prefill chunks together (vLLM v1's `{request: tokens}`). Decode rows come first, so a long
prompt never delays them. Two resources are admitted together: KV blocks, over-committed and won back by preempting the youngest, which
is computed again later; and adapters, pinned on the device while a sequence runs.
"""

import heapq
import time
from dataclasses import dataclass

from server.engine.sequence import Sequence
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers
from server.types import EngineRequest


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's share of a step: its next `num_tokens` tokens. `samples`: its last token is among them, so a new one is drawn."""

    sequence: Sequence
    num_tokens: int
    samples: bool


class Scheduler:
    """Queued and running sequences. `schedule` and `complete` alternate; `add` and `remove` may come between."""

    # A sequence whose adapter finds no room on the device may be overtaken by others for so long; then nobody passes it.
    MAX_OVERTAKEN_S = 2.0
    # How many such sequences are looked behind of in one step, so that a step's cost does not grow with the queue.
    MAX_LOOKED_PAST = 64

    def __init__(
        self,
        pool: BlockPool,
        tiers: AdapterTiers,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        prefix_caching: bool = True,
        base_revision: str = "",
    ) -> None:
        self.pool, self.tiers = pool, tiers
        self.max_batch_tokens, self.max_batch_size = max_batch_tokens, max_batch_size
        self.prefix_caching, self.base_revision = prefix_caching, base_revision
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, Sequence]] = []  # a heap by order of arrival
        self._parked: dict[str, list[Sequence]] = {}  # adapter -> sequences that wait for it to be read
        self._sequences: dict[str, Sequence] = {}
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
        return bool(self.running or self._waiting)

    def add(self, request: EngineRequest) -> None:
        """Queue a request and start to bring its adapter. ValueError if the id is in use or it could never run."""
        if request.request_id in self._sequences:
            raise ValueError(f"request_id '{request.request_id}' is already in use")
        needed = len(request.token_ids) + request.params.max_new_tokens
        if needed > self.pool.num_blocks * self.pool.block_size:
            raise ValueError(f"{needed} tokens do not fit in the cache of {self.pool.num_blocks * self.pool.block_size} tokens")
        sequence = Sequence(request, self._next_order, self.base_revision)
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
        elif sequence.adapter_hash in self._parked and sequence in self._parked[sequence.adapter_hash]:
            self._parked[sequence.adapter_hash].remove(sequence)
        else:
            self._waiting = [item for item in self._waiting if item[1] is not sequence]
            heapq.heapify(self._waiting)
        if sequence.adapter_hash:
            self.tiers.unwant(sequence.adapter_hash)
        return sequence

    def collect_adapters(self) -> list[tuple[Sequence, Exception]]:
        """Let those run whose adapter has arrived; returns the sequences whose adapter could not be read, removed, with the reason."""
        failed = []
        for adapter_hash, error in self.tiers.poll():
            for sequence in self._parked.pop(adapter_hash, []):
                self._parked.setdefault(adapter_hash, []).append(sequence)
                self.remove(sequence.request.request_id)
                failed.append((sequence, error))
            self._parked.pop(adapter_hash, None)
        for adapter_hash in [h for h in self._parked if self.tiers.state(h) in ("host", "device")]:
            for sequence in self._parked.pop(adapter_hash):
                heapq.heappush(self._waiting, (sequence.order, sequence))
        return failed

    def schedule(self) -> list[Chunk]:
        """The next step: at most one chunk a sequence, `max_batch_tokens` in all. Empty if nothing can run now."""
        chunks: list[Chunk] = []
        budget = self.max_batch_tokens
        num_preemptions = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                if budget == 0:
                    break
                if sequence not in self.running or (sequence.num_pending == 1) != decoding:
                    continue
                num_tokens = min(sequence.num_pending, budget)
                if self._grow(sequence, num_tokens, {chunk.sequence for chunk in chunks} if self.pool.num_free < len(self.running) else ()):
                    chunks.append(Chunk(sequence, num_tokens, num_tokens == sequence.num_pending))
                    budget -= num_tokens
        if self.num_preemptions == num_preemptions:
            self._admit(chunks, budget)
        return chunks

    def complete(self, chunk: Chunk) -> None:
        """The step has run: the chunk's tokens are in the cache, and full blocks can be found by others."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        if not self.prefix_caching:
            return
        num_full = sequence.num_computed // self.pool.block_size
        if num_full > sequence.num_published:
            hashes = sequence.block_hashes(num_full, self.pool.block_size)
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.blocks[index], hashes[index])
            sequence.num_published = num_full

    def _enqueue(self, sequence: Sequence) -> None:
        if sequence.adapter_hash and self.tiers.state(sequence.adapter_hash) not in ("host", "device"):
            self._parked.setdefault(sequence.adapter_hash, []).append(sequence)
        else:
            heapq.heappush(self._waiting, (sequence.order, sequence))

    def _grow(self, sequence: Sequence, num_tokens: int, scheduled) -> bool:
        """Blocks for the sequence's next tokens; preempts the youngest sequences that are not in this step, itself at the last."""
        missing = -(-(sequence.num_computed + num_tokens) // self.pool.block_size) - len(sequence.blocks)
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                sequence.blocks += blocks
                return True
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
        sequence.blocks = []
        if sequence.adapter_hash:
            self.tiers.release(sequence.adapter_hash)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        passed: list[tuple[int, Sequence]] = []
        now = time.monotonic()
        while self._waiting and budget > 0 and len(self.running) < self.max_batch_size and len(passed) < self.MAX_LOOKED_PAST:
            item = heapq.heappop(self._waiting)
            sequence = item[1]
            if sequence.adapter_hash and not self.tiers.acquire(sequence.adapter_hash):
                if self.tiers.state(sequence.adapter_hash) in ("absent", "loading"):  # it left the host while the sequence was out
                    self._parked.setdefault(sequence.adapter_hash, []).append(sequence)
                    continue
                passed.append(item)
                if now - sequence.arrived_at > self.MAX_OVERTAKEN_S:
                    break
                continue
            num_tokens = self._start(sequence, budget)
            if num_tokens == 0:
                if sequence.adapter_hash:
                    self.tiers.release(sequence.adapter_hash)
                passed.append(item)
                break
            chunks.append(Chunk(sequence, num_tokens, num_tokens == sequence.num_pending))
            budget -= num_tokens
        for item in passed:
            heapq.heappush(self._waiting, item)

    def _start(self, sequence: Sequence, budget: int) -> int:
        """Take blocks for the sequence's first chunk; returns its tokens, 0 if there is no room."""
        size = self.pool.block_size
        reuse: list[int] = []
        if self.prefix_caching and sequence.prompt_logprobs is None:
            # The last token is always computed: its logits are what the step is for.
            reuse = self.pool.match(sequence.block_hashes((len(sequence.tokens) - 1) // size, size))
        num_computed = len(reuse) * size
        num_tokens = min(len(sequence.tokens) - num_computed, budget)
        missing = -(-(num_computed + num_tokens) // size) - len(reuse)
        # Room for the next token of those who run, so that the newcomer does not push them out at once.
        if self.running and self.pool.num_free - missing - len(reuse) < len(self.running):
            return 0
        blocks = self.pool.allocate(missing, reuse)
        if blocks is None:
            return 0
        sequence.blocks = blocks
        sequence.num_computed = num_computed
        sequence.num_published = len(reuse)
        if sequence.started_at is None:
            sequence.started_at = time.monotonic()
            sequence.num_cached = num_computed
            self.num_cached_tokens += num_computed
        self.running.append(sequence)
        return num_tokens

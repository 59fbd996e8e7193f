"""Which sequences get how many tokens in the next step. Host bookkeeping alone: no torch, no sockets, no clock but for waiting times.

One budget of tokens a step holds decode rows and prefill chunks together (vLLM v1's `{request: tokens}`). Decode rows come first, and
beside them prompts have a share of the step that follows from how many of their tokens wait (`_prompt_budget`): few that come and go hold
the others up little, a backlog (or one prompt as long as one) by whole steps. Who starts next is the waiting queue's to say
(engine.fairness). Two resources are admitted together: KV blocks, over-committed and won back by preempting the youngest, which is
computed again later; and adapters, pinned on the device while a sequence runs. The youngest is who started last: with another order a
tenant that is next by right would be the first to be preempted.
"""

import logging
import time
from collections.abc import Callable, Mapping

from server.engine.chunk import Chunk, longest_chunk
from server.engine.failures import cannot_be_pinned
from server.engine.fairness import FairQueue
from server.engine.grammar import Matcher
from server.engine.pins import Pins
from server.engine.sequence import Sequence, check_request
from server.engine.start import Start, Starts
from server.engine.waiting import WaitingQueue
from server.engine.waits import Waits
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers
from server.types import EngineRequest

log = logging.getLogger(__name__)

NOT_HERE = ("absent", "loading", "copying")  # states of an adapter whose arrival the tiers will tell
# Prompt tokens that a step has beside rows that decode: so many at least, else a share of all that wait. Every decoding row waits for them.
# (Mistral-7B on an H100: a step of 60 rows takes 7.8 ms, with 256 prompt tokens beside them 10.9, with 512 16.6, with 768 24.3.)
MIN_PROMPT_TOKENS, BACKLOG_SHARE = 512, 2


class Scheduler:
    """Queued and running sequences. A step is `schedule`, `advance` for each chunk once it is launched, and `publish` once its tokens are
    known, which may be after the next `schedule`; `add` and `remove` may come between."""

    def __init__(
        self,
        pool: BlockPool,
        tiers: AdapterTiers,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        max_sequence_len: int | None = None,
        max_batch_adapters: int | None = None,
        max_queue_s: float | None = None,
        prefix_caching: bool = True,
        base_revision: str = "",
        vocab_size: Callable[[str], int] | None = None,
        shares_memory: bool = False,
        queue: WaitingQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`vocab_size(adapter hash, or "" for the base)`: how many ids its rows may hold; adapters' are asked when pinned.
        `shares_memory`: adapters lie in the pool's blocks, so that an idle one can make room for tokens.
        `max_batch_adapters`: how many adapters run at once at most, whatever there is room for. `max_queue_s`: how long a sequence may
        wait for its first step. `queue`: a FairQueue if None."""
        self.pool, self.tiers = pool, tiers
        self.max_batch_tokens, self.max_batch_size = max_batch_tokens, max_batch_size
        capacity = pool.num_blocks * pool.block_size
        self.max_sequence_len = min(max_sequence_len or capacity, capacity)
        self.prefix_caching, self.base_revision = prefix_caching, base_revision
        self._shares_memory, self._clock = shares_memory, clock
        self._starts = Starts(pool, tiers, prefix_caching=prefix_caching, shares_memory=shares_memory)
        self.queue = FairQueue() if queue is None else queue
        self._waits = Waits(max_queue_s)
        self.running: list[Sequence] = []
        self._pins = Pins(tiers, vocab_size, max_batch_adapters)
        self._parked: dict[str, list[Sequence]] = {}  # adapter -> sequences that wait for it to be read
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[tuple[Sequence, Exception]] = []
        self._next_order = self._next_start = 0
        self._num_unstarted = 0  # prompt tokens of sequences that have not had a step yet
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued, those that wait for their adapter included."""
        return len(self._sequences) - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to return."""
        return bool(self.running or self.queue.num_queued or self._failed) or self._waits.is_over(self._clock())

    @property
    def sequences(self) -> Mapping[str, Sequence]:
        """All that are queued or running, by request id."""
        return self._sequences

    def add(self, request: EngineRequest, matcher: Matcher | None = None) -> None:
        """Queue a request and start to bring its adapter. ValueError if it could never run; KeyError if its id is in use; Overloaded if
        it would wait for longer than it may."""
        if request.request_id in self._sequences:
            raise KeyError(request.request_id)
        check_request(request, self.max_sequence_len)
        if request.adapter is None:
            self._pins.check_vocabulary(request)
        sequence = Sequence(request, self._next_order, self.base_revision, matcher, self._clock())
        sequence.work = self._waits.work(sequence)
        self._waits.check(self.queue.work_before(sequence))
        self.queue.join(sequence)
        self._waits.watch(sequence)
        self._next_order += 1
        self._num_unstarted += sequence.prompt_len
        self._sequences[request.request_id] = sequence
        if request.adapter is not None:
            self.tiers.want(request.adapter)
        self._enqueue(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a sequence, running or not, and free all that it holds; None if it is not here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self.queue.leave(sequence)
        self._waits.ended(sequence)
        if sequence.start_order is None:
            self._num_unstarted -= sequence.prompt_len
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
        """Let those run whose adapter has arrived; returns the sequences whose adapter cannot be had, or who have waited for too long,
        removed, with the reason."""
        arrived, failed = self.tiers.poll()
        for adapter_hash in arrived:
            for sequence in self._parked.pop(adapter_hash, ()):
                self.queue.push(sequence)
        for adapter_hash, error in failed:
            for sequence in list(self._parked.get(adapter_hash, ())):
                self._fail(sequence, error)
        for sequence in self._waits.expired(self._clock()):
            if sequence.started_at is None and self.holds(sequence):
                self._fail(sequence, self._waits.over(self.queue.work_before(sequence)))
        found, self._failed = self._failed, []
        return found

    def schedule(self) -> list[Chunk]:
        """The next step: at most one chunk a sequence, `max_batch_tokens` in all. Empty if nothing can run now."""
        chunks: list[Chunk] = []
        budget, num_preemptions = self.max_batch_tokens, self.num_preemptions
        prompts: list[Sequence] = []
        num_rows = 0  # that go on
        for sequence in list(self.running):
            num_tokens = len(sequence.tokens)
            if num_tokens >= sequence.max_len:  # it ends with what was launched
                continue
            num_rows += 1
            if num_tokens - sequence.num_computed > 1:
                prompts.append(sequence)
            elif budget > 0 and (num_tokens <= sequence.num_places or (sequence.blocks and self._grow(sequence, 1, chunks))):
                chunks.append(Chunk(sequence, 1, True))
                budget -= 1
        budget = min(budget, self._prompt_budget(prompts)) if chunks else budget
        for sequence in prompts:
            num_tokens = min(longest_chunk(sequence), budget)
            # One that was preempted for another of this step holds no blocks any more, and waits.
            if num_tokens > 0 and sequence.blocks and self._grow(sequence, num_tokens, chunks):
                chunks.append(Chunk(sequence, num_tokens, num_tokens == sequence.num_pending))
                budget -= num_tokens
        self.queue.charge(chunks)
        num_chunks = len(chunks)
        if self.num_preemptions == num_preemptions:
            self._admit(chunks, budget, num_rows)
        started = sum(chunk.sequence.work for chunk in chunks[num_chunks:])
        self._waits.note_step(self._clock(), started, somebody_waits=self.queue.num_queued > 0)
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

    def _prompt_budget(self, prompts: list[Sequence]) -> int:
        """Prompt tokens of a step in which rows decode. Few are waiting: their first token can come a step later than it might. Many are:
        larger steps get through them sooner."""
        return max(MIN_PROMPT_TOKENS, (self._num_unstarted + sum(sequence.num_pending for sequence in prompts)) // BACKLOG_SHARE)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.remove(sequence.request.request_id)
        self._failed.append((sequence, error))

    def _enqueue(self, sequence: Sequence) -> None:
        if sequence.adapter_hash and self.tiers.state(sequence.adapter_hash) in NOT_HERE:
            self._parked.setdefault(sequence.adapter_hash, []).append(sequence)
        else:
            self.queue.push(sequence)

    def _grow(self, sequence: Sequence, num_tokens: int, chunks: list[Chunk]) -> bool:
        """Blocks for the sequence's next tokens; preempts the youngest sequences that are not in this step, itself at the last."""
        missing = -(-(sequence.num_computed + num_tokens) // self.pool.block_size) - len(sequence.blocks)
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                sequence.hold(sequence.blocks + blocks, self.pool.block_size)
                return True
            if self._shares_memory and self.tiers.yield_room():
                continue
            scheduled = {chunk.sequence for chunk in chunks}
            victim = max((s for s in self.running if s not in scheduled), key=lambda s: s.start_order)
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
        sequence.hold([], self.pool.block_size)
        self._pins.release(sequence)

    def _admit(self, chunks: list[Chunk], budget: int, num_rows: int) -> None:
        """Start waiting sequences, those first whose turn it is. While one finds no blocks nobody else starts; room for adapters is the
        queue's to divide."""
        self.queue.begin(self._pins.running, self._clock())
        while budget > 0 and num_rows < self.max_batch_size and (sequence := self.queue.first()) is not None:
            start = self._find_start(sequence, budget)
            if start is None:
                return
            try:
                has_adapter = self._pins.pin(sequence)
            except Exception as error:
                log.warning("request %s: its adapter cannot be used (%s)", sequence.request.request_id, error)
                self._fail(sequence, cannot_be_pinned(error))
                continue
            # The adapter may have taken blocks that `start` counts on.
            if has_adapter and self._shares_memory and (start := self._find_start(sequence, budget)) is None:
                self._pins.release(sequence)
                return
            if has_adapter:
                chunks.append(self._start(sequence, start))
                budget -= start.num_tokens
                num_rows += 1
            elif self.tiers.state(sequence.adapter_hash) in NOT_HERE:  # it left while the sequence was out, or is just on its way
                self.queue.take(sequence)
                self._parked.setdefault(sequence.adapter_hash, []).append(sequence)
            elif self.queue.refuse(sequence) and self._shares_memory and self._pins.lacks_blocks(sequence.adapter_hash):
                return  # nobody may take them for ever

    def _find_start(self, sequence: Sequence, budget: int) -> Start | None:
        # Room for the next token of those who run, so that the newcomer does not push them out at once.
        return self._starts.find(sequence, budget, reserve=len(self.running))

    def _start(self, sequence: Sequence, start: Start) -> Chunk:
        blocks = self.pool.allocate(start.num_blocks, start.reuse)
        assert blocks is not None, "a start says that there is room"
        self.queue.start(sequence)
        sequence.hold(blocks, self.pool.block_size)
        sequence.num_published = len(start.reuse)
        sequence.num_computed = len(start.reuse) * self.pool.block_size
        if sequence.start_order is None:
            sequence.start_order = self._next_start
            self._next_start += 1
            self._num_unstarted -= sequence.prompt_len
            sequence.started_at = self._clock()
            sequence.num_cached = sequence.num_charged = sequence.num_computed
            self.num_cached_tokens += sequence.num_computed
        self.running.append(sequence)
        chunk = Chunk(sequence, start.num_tokens, start.num_tokens == sequence.num_pending)
        self.queue.charge((chunk,))
        return chunk

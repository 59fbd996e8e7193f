"""The engine without its sockets: requests in, outputs out, one step at a time. Usable in a script or a benchmark as it is.

Owns the ends of requests: every one that was added ends in exactly one output with a finish_reason. What fails in a step is narrowed down
to the sequences that make it fail; the others go on. Where the runner defers, a step is scheduled and launched before the last one's tokens
are looked at; a sequence that turns out to have ended then has one row for nothing.
"""

import logging
import time
from collections.abc import Iterator

from server.engine.chunk import Chunk
from server.engine.failures import failure, is_fatal, is_out_of_memory, let_go
from server.engine.grammar import Matcher
from server.engine.grammar_queue import GrammarQueue
from server.engine.runner import Launch, Runner
from server.engine.sampler import Sampled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.errors import GenerationFailed, Overloaded
from server.ipc.messages import EngineStats
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers
from server.types import EngineRequest, Logprob, SequenceOutput

log = logging.getLogger(__name__)


class EngineCore:
    """Scheduler and runner together. Not thread-safe: one thread calls it."""

    def __init__(self, scheduler: Scheduler, runner: Runner, tiers: AdapterTiers, pool: BlockPool, grammars: GrammarQueue) -> None:
        self.scheduler, self.runner, self.tiers, self.pool = scheduler, runner, tiers, pool
        self.grammars = grammars
        self._outputs: list[SequenceOutput] = []
        self._launched: Launch | None = None  # a step whose tokens have not been looked at
        self.num_steps = self.num_prompt_tokens = self.num_output_tokens = 0

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that can never run is answered with an error at the next step."""
        try:
            if request.request_id in self.grammars or request.request_id in self.scheduler.sequences:
                raise KeyError(request.request_id)
            if request.params.grammar is None:
                self.scheduler.add(request)
            else:
                self.grammars.add(request)
                if request.adapter is not None:
                    self.tiers.prefetch(request.adapter)
        except ValueError as error:
            self._outputs.append(failure(request.request_id, GenerationFailed(str(error))))
        except Overloaded as error:
            self._outputs.append(failure(request.request_id, error))
        except KeyError:  # an answer would end the other request of that id
            log.error("request id %s is in use; the second request of that id is dropped", request.request_id)

    def _queue(self, request: EngineRequest, outcome: Matcher | Exception) -> None:
        """Queue a request whose grammar is compiled, or answer it if there is no such grammar."""
        if isinstance(outcome, Exception):
            self._outputs.append(failure(request.request_id, outcome))
            return
        try:
            self.scheduler.add(request, outcome)
        except ValueError as error:
            self._outputs.append(failure(request.request_id, GenerationFailed(str(error))))
        except Overloaded as error:
            self._outputs.append(failure(request.request_id, error))

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored."""
        if self.grammars.remove(request_id) or self.scheduler.remove(request_id) is not None:
            self._outputs.append(SequenceOutput(request_id, finish_reason="aborted"))

    def abort_all(self) -> None:
        """End every request now."""
        for request_id in [*self.scheduler.sequences, *self.grammars.request_ids]:
            self.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something now (an adapter that is being read sets `tiers.arrived` when it is here)."""
        if self._launched is not None or self._outputs or self.scheduler.has_work:
            return True
        return self.grammars.arrived.is_set() or self.tiers.has_news

    def step(self) -> list[SequenceOutput]:
        """Collect adapters that arrived, start one step, and return what the last one brought (or this one, where steps do not overlap)."""
        for request, outcome in self.grammars.take():
            self._queue(request, outcome)
        for sequence, error in self.scheduler.collect_failed():
            self._outputs.append(failure(sequence.request.request_id, error))
        if self._launched is not None and any(sequence.needs_host for sequence in self.scheduler.running):
            self._collect()  # the next step needs its tokens on the host
        chunks = self.scheduler.schedule()
        before = self._launched
        if chunks:
            self.num_steps += 1
            launched = self._launch(chunks)
            if self._launched is before:
                self._collect()
            self._launched = launched
            if launched is not None and not launched.is_deferred:
                self._collect()
        else:
            self._collect()
        return self.take_outputs()

    def num_to_capture(self, *, only_wanted: bool = False) -> int:
        """Steps that are not captured yet, or those of them that were wanted; others stand in for them (engine.captures)."""
        return self.runner.graphs.captures.num_left(only_wanted=only_wanted) if self.runner.graphs is not None else 0

    def capture_more(self, *, only_wanted: bool = False) -> None:
        """Capture one of them, which takes a tenth of a second. Where that fails, and the device is not lost, no more are."""
        try:
            self.runner.graphs.capture_more(only_wanted=only_wanted)
        except Exception as error:
            log.warning("no more steps are captured", exc_info=error)
            self._spare(error)
            self.runner.graphs.captures.give_up()

    def take_outputs(self) -> list[SequenceOutput]:
        """What has not been returned yet."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Counters and what is held now."""
        scheduler, pool, tiers = self.scheduler, self.pool, self.tiers
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + len(self.grammars),
            num_tokens=sum(len(sequence.tokens) for sequence in scheduler.sequences.values()),
            max_tokens=pool.num_blocks * pool.block_size,
            max_batch_size=scheduler.max_batch_size,
            num_blocks_used=pool.num_used,
            num_blocks=pool.num_blocks,
            num_blocks_cached=pool.num_cached,
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_adapters_device=tiers.device.count,
            num_adapters_host=tiers.host.count,
            adapter_bytes_device=tiers.device.used_bytes,
            adapter_bytes_host=tiers.host.used_bytes,
        )

    def _launch(self, chunks: list[Chunk]) -> Launch | None:
        """Start the step. Where that fails, the chunks are run by halves, until those that fail stand alone."""
        try:
            launched = self.runner.launch(chunks, self._launched)
        except Exception as error:
            failed = self._spare(error)
        else:
            for chunk in chunks:
                self.scheduler.advance(chunk)
            return launched
        self._collect()
        self._run_halves(chunks, failed)
        return None

    def _spare(self, error: Exception) -> Exception:
        """A failure that the engine survives, without what it holds; raised if it cannot."""
        if is_fatal(error):
            raise error
        let_go(error)
        return error

    def _run_halves(self, chunks: list[Chunk], error: Exception) -> None:
        """Run chunks whose step failed with `error`, none of them advanced, by halves. Running a chunk again is harmless."""
        chunks = [chunk for chunk in chunks if self.scheduler.holds(chunk.sequence)]
        if is_out_of_memory(error) and self._shrink(sum(chunk.num_tokens for chunk in chunks)) and len(chunks) == 1:
            return  # its next chunk will be a smaller one
        if len(chunks) == 1:
            log.error("request %s failed in a step", chunks[0].sequence.request.request_id, exc_info=error)
            self._fail(chunks[0].sequence, GenerationFailed(f"the engine failed on this request ({type(error).__name__})"))
            return
        log.warning("a step of %d sequences failed (%s); running its halves", len(chunks), type(error).__name__)
        for half in (chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]):
            try:
                sampled = self.runner.execute(half) if half else {}
            except Exception as again:
                failed = self._spare(again)
            else:
                for chunk in half:
                    self.scheduler.advance(chunk)
                    self._advance(chunk, sampled.get(chunk.sequence.request.request_id))
                continue
            self._run_halves(half, failed)

    def _shrink(self, num_tokens: int) -> bool:
        """The device had no room for a step of so many tokens: let no later step have as many. False if it could not be any smaller."""
        scheduler = self.scheduler
        smaller = max(min(num_tokens, scheduler.max_batch_tokens) // 2, scheduler.max_batch_size)
        if num_tokens <= scheduler.max_batch_size:
            return False
        if smaller < scheduler.max_batch_tokens:
            log.error("out of memory in a step of %d tokens: steps have at most %d from now on", num_tokens, smaller)
            scheduler.max_batch_tokens = smaller
        return True

    def _collect(self) -> None:
        """What the last step that was launched brought, once it is there."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        sampled = launched.collect()
        for chunk in launched.chunks:
            if self.scheduler.holds(chunk.sequence):  # not ended since, by its last token or by an abort
                self._advance(chunk, sampled.get(chunk.sequence.request.request_id))

    def _advance(self, chunk: Chunk, sampled: Sampled | None) -> None:
        sequence = chunk.sequence
        if not chunk.samples:
            self.scheduler.publish(sequence)
            return
        if (error := _why_not(sequence, sampled)) is not None:
            self._fail(sequence, error)
            return
        is_first = sequence.num_outputs == sequence.num_unknown
        sequence.learn(sampled.token)
        self.scheduler.publish(sequence)
        params = sequence.request.params
        output = SequenceOutput(sequence.request.request_id, [sampled.token])
        if is_first:
            self.num_prompt_tokens += sequence.prompt_len
            output.num_cached_tokens = sequence.num_cached
            output.queued_s = sequence.started_at - sequence.arrived_at
            output.prompt_logprobs = _prompt_logprobs(sequence)
        if sampled.logprob is not None:
            output.logprobs = [sampled.logprob]
        self.num_output_tokens += 1
        if sampled.token in params.stop_token_ids or (sequence.matcher is not None and sequence.matcher.finished):
            output.finish_reason = "stop"
        elif sequence.num_outputs - sequence.num_unknown >= params.max_new_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self.scheduler.remove(sequence.request.request_id)
        self._outputs.append(output)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.scheduler.remove(sequence.request.request_id)
        self._outputs.append(failure(sequence.request.request_id, error))


def _why_not(sequence: Sequence, sampled: Sampled | None) -> GenerationFailed | None:
    """Why the token cannot be the sequence's next one; None if it can, and then its grammar has taken it."""
    if sampled is None or sampled.token is None:
        if sequence.matcher is not None and sequence.matcher.failed:
            return GenerationFailed("the answer's grammar became too complex to follow")
        return GenerationFailed("the model's logits are not finite for this request")
    try:
        if sequence.matcher is not None:
            sequence.matcher.accept(sampled.token)
    except GenerationFailed as error:
        return error
    return None


def _prompt_logprobs(sequence: Sequence):
    if sequence.prompt_logprobs is None:
        return None
    return [Logprob(sequence.tokens[0], None), *sequence.prompt_logprobs[1:]]


def outputs_until_idle(core: EngineCore, timeout_s: float = 600.0) -> Iterator[SequenceOutput]:
    """Step until nothing is left, with the outputs as they come. TimeoutError if it takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while core.has_work or core.scheduler.num_waiting or len(core.grammars) or core.scheduler.running:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{core.scheduler.num_waiting} waiting, {len(core.scheduler.running)} running after {timeout_s} s")
        if not core.has_work:
            core.tiers.arrived.wait(0.1)
        yield from core.step()


def run_until_idle(core: EngineCore, timeout_s: float = 600.0) -> list[SequenceOutput]:
    """All that `outputs_until_idle` has, for scripts and tests."""
    return list(outputs_until_idle(core, timeout_s))

"""The engine without its sockets: requests in, outputs out, one step at a time. Usable in a script or a benchmark as it is.

Owns the ends of requests: every one that was added ends in exactly one output with a finish_reason. What fails in a step is narrowed down
to the sequences that make it fail; the others go on.
"""

import logging
import time

import torch

from server.engine.runner import Runner
from server.engine.sampler import Sampled
from server.engine.scheduler import Chunk, Scheduler
from server.engine.sequence import Sequence
from server.errors import GenerationFailed, ServerError
from server.ipc.messages import EngineStats
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers
from server.types import EngineRequest, Logprob, SequenceOutput

log = logging.getLogger(__name__)


class EngineCore:
    """Scheduler and runner together. Not thread-safe: one thread calls it."""

    def __init__(self, scheduler: Scheduler, runner: Runner, tiers: AdapterTiers, pool: BlockPool) -> None:
        self.scheduler, self.runner, self.tiers, self.pool = scheduler, runner, tiers, pool
        self._outputs: list[SequenceOutput] = []
        self.num_steps = self.num_prompt_tokens = self.num_output_tokens = 0

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that can never run is answered with an error at the next step."""
        try:
            self.scheduler.add(request)
        except ValueError as error:
            self._outputs.append(_failure(request.request_id, GenerationFailed(str(error))))
        except KeyError:  # an answer would end the other request of that id
            log.error("request id %s is in use; the second request of that id is dropped", request.request_id)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored."""
        if self.scheduler.remove(request_id) is not None:
            self._outputs.append(SequenceOutput(request_id, finish_reason="aborted"))

    def abort_all(self) -> None:
        """End every request now."""
        for request_id in self.scheduler.request_ids:
            self.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something now (an adapter that is being read sets `tiers.arrived` when it is here)."""
        return self.scheduler.has_work or bool(self._outputs) or self.tiers.arrived.is_set()

    def step(self) -> list[SequenceOutput]:
        """Collect adapters that arrived, run one step, and return what it brought."""
        for sequence, error in self.scheduler.collect_failed():
            self._outputs.append(_failure(sequence.request.request_id, error))
        chunks = self.scheduler.schedule()
        if chunks:
            self.num_steps += 1
            for chunk, sampled in self._execute(chunks):
                self._advance(chunk, sampled)
        return self.take_outputs()

    def take_outputs(self) -> list[SequenceOutput]:
        """What has not been returned yet."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Counters and what is held now."""
        scheduler, pool, tiers = self.scheduler, self.pool, self.tiers
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
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

    def _execute(self, chunks: list[Chunk]) -> list[tuple[Chunk, Sampled | None]]:
        """Run the chunks; where that fails, halves of them, until those that fail stand alone. Running a chunk again is harmless."""
        try:
            sampled = self.runner.execute(chunks)
        except Exception as error:
            if _is_fatal(error):
                raise
            if len(chunks) > 1:
                log.warning("a step of %d sequences failed (%s); running its halves", len(chunks), type(error).__name__)
                middle = len(chunks) // 2
                return self._execute(chunks[:middle]) + self._execute(chunks[middle:])
            log.exception("request %s failed in a step", chunks[0].sequence.request.request_id)
            self._fail(chunks[0].sequence, GenerationFailed(f"the engine failed on this request ({type(error).__name__})"))
            return []
        return [(chunk, sampled.get(chunk.sequence.request.request_id)) for chunk in chunks]

    def _advance(self, chunk: Chunk, sampled: Sampled | None) -> None:
        sequence = chunk.sequence
        if not chunk.samples:
            self.scheduler.complete(chunk)
            return
        if sampled is None or sampled.token is None:
            self._fail(sequence, GenerationFailed("the model's logits are not finite for this request"))
            return
        self.scheduler.complete(chunk)
        params = sequence.request.params
        output = SequenceOutput(sequence.request.request_id, [sampled.token])
        if sequence.num_outputs == 0:
            self.num_prompt_tokens += sequence.prompt_len
            output.num_cached_tokens = sequence.num_cached
            output.queued_s = sequence.started_at - sequence.arrived_at
            output.prompt_logprobs = _prompt_logprobs(sequence)
        if sampled.logprob is not None:
            output.logprobs = [sampled.logprob]
        sequence.append(sampled.token)
        self.num_output_tokens += 1
        if sampled.token in params.stop_token_ids:
            output.finish_reason = "stop"
        elif sequence.num_outputs >= params.max_new_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self.scheduler.remove(sequence.request.request_id)
        self._outputs.append(output)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.scheduler.remove(sequence.request.request_id)
        self._outputs.append(_failure(sequence.request.request_id, error))


def _is_fatal(error: Exception) -> bool:
    """Whether the device itself is lost (a CUDA error leaves its context unusable), so that no other request could run either."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def _prompt_logprobs(sequence: Sequence):
    if sequence.prompt_logprobs is None:
        return None
    return [Logprob(sequence.tokens[0], None), *sequence.prompt_logprobs[1:]]


def _failure(request_id: str, error: Exception) -> SequenceOutput:
    if isinstance(error, ServerError):
        return SequenceOutput(request_id, finish_reason="error", error=error.message, error_kind=type(error).__name__)
    return SequenceOutput(
        request_id, finish_reason="error", error=f"the adapter could not be loaded ({type(error).__name__})", error_kind="GenerationFailed"
    )


def run_until_idle(core: EngineCore, timeout_s: float = 600.0) -> list[SequenceOutput]:
    """Step until nothing is left; for scripts, tests and benchmarks. TimeoutError if it takes longer than `timeout_s`."""
    outputs: list[SequenceOutput] = []
    deadline = time.monotonic() + timeout_s
    while core.has_work or core.scheduler.num_waiting or core.scheduler.running:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{core.scheduler.num_waiting} waiting, {len(core.scheduler.running)} running after {timeout_s} s")
        if not core.has_work:
            core.tiers.arrived.wait(0.1)
        outputs += core.step()
    return outputs

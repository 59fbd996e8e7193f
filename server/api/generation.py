"""The one place where a checked request becomes sequences of the engine, and their outputs one generation again.

Owns the fan-out (several prompts, several samples each), the prompt's length checks and the choice of the best. Knows neither HTTP nor the
shapes of answers. All generating routes use it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import msgspec

from server.api.adapters import ResolvedAdapter
from server.api.engine import EngineClient
from server.api.engines import Engines
from server.api.sampling import Limits, too_long
from server.api.sequence import TextSequence, Token, follow
from server.api.text.tokenizer import Tokenizer
from server.errors import AdapterRefused, ValidationFailed
from server.types import EngineRequest, SamplingParams, SequenceOutput

_MAX_MENDED = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides a generation. `params` are of the first sample of each prompt; later ones differ in the seed, and if the seed was
    drawn here, so do those of each prompt: equal prompts are then asked for different answers."""

    request_id: str
    prompts: Sequence[Sequence[int]]  # token ids
    max_new_tokens: Sequence[int]  # one a prompt
    params: SamplingParams
    tokenizer: Tokenizer
    samples: int = 1
    seed_is_drawn: bool = False
    adapter: ResolvedAdapter | None = None
    stops: Sequence[str] = ()
    keep_stop: bool = True
    stop_ids: Collection[int] = ()  # special tokens that the request wrote as stop strings
    tenant: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    mend: Callable[[], Awaitable[bool]] | None = None  # makes the adapter's pack anew if it is damaged; whether it was

    @property
    def max_tokens(self) -> int:
        """Tokens that it reads and may generate at most, in all; prompts count once."""
        return sum(map(len, self.prompts)) + sum(self.max_new_tokens) * self.samples


@dataclass
class Generation:
    """A running or finished plan. `sequences` has `samples` entries for each prompt, prompts in order."""

    plan: Plan
    engine: EngineClient | Engines
    sequences: list[TextSequence] = field(init=False)

    def __post_init__(self) -> None:
        self.started_at = time.monotonic()
        self.sequences = [
            TextSequence(index, self.plan.prompts[index // self.plan.samples])
            for index in range(len(self.plan.prompts) * self.plan.samples)
        ]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.plan.prompts)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the first sample of each prompt read from the prefix cache."""
        return sum(sequence.num_cached_tokens for sequence in self.sequences[:: self.plan.samples])

    def tokens(self) -> AsyncGenerator[tuple[TextSequence, Token], None]:
        """Every token as it comes. Closing the iterator aborts what still runs; one failed sequence ends all with its error."""
        return self._follow(self.sequences[0]) if len(self.sequences) == 1 else self._merged()

    async def _merged(self) -> AsyncGenerator[tuple[TextSequence, Token], None]:
        arrived: asyncio.Queue[tuple[TextSequence, Token] | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._run(sequence, arrived)) for sequence in self.sequences]
        try:
            num_running = len(tasks)
            while num_running:
                item = await arrived.get()
                if item is not None:
                    yield item
                    continue
                num_running -= 1
                for task in tasks:
                    if task.done() and (error := task.exception()) is not None:
                        raise error
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def run(self) -> None:
        """Generate to the end."""
        async for _ in self.tokens():
            pass

    async def _run(self, sequence: TextSequence, arrived: asyncio.Queue[tuple[TextSequence, Token] | None]) -> None:
        try:
            async with aclosing(self._follow(sequence)) as tokens:
                async for item in tokens:
                    arrived.put_nowait(item)
        finally:
            # After this coroutine has ended, so that its error is there to be read.
            asyncio.get_running_loop().call_soon(arrived.put_nowait, None)

    def _follow(self, sequence: TextSequence) -> AsyncGenerator[tuple[TextSequence, Token], None]:
        plan = self.plan
        prompt, sample = divmod(sequence.index, plan.samples)
        seed = plan.params.seed + (sequence.index if plan.seed_is_drawn else sample)
        params = msgspec.structs.replace(plan.params, max_new_tokens=plan.max_new_tokens[prompt], seed=seed % (1 << 64))
        request = EngineRequest(
            request_id=f"{plan.request_id}-{sequence.index}",
            token_ids=list(sequence.prompt_ids),
            params=params,
            adapter=plan.adapter.ref if plan.adapter is not None else None,
            cache_salt=plan.cache_salt,
            tenant=plan.tenant,
            weight=plan.weight,
        )
        return follow(sequence, self._outputs(request), plan.tokenizer, stops=plan.stops, keep_stop=plan.keep_stop, stop_ids=plan.stop_ids)

    async def _outputs(self, request: EngineRequest) -> AsyncGenerator[SequenceOutput, None]:
        """What the engine says; again from the start if it refused, before any token, a pack that was damaged on disk. It may refuse once
        more what it had begun to read before the pack was made anew."""
        for num_left in reversed(range(_MAX_MENDED + 1)):
            has_begun = False
            try:
                async with aclosing(self.engine.submit(request)) as outputs:
                    async for output in outputs:
                        has_begun = True
                        yield output
                return
            except AdapterRefused:
                if has_begun or not num_left or self.plan.mend is None or not await self.plan.mend():
                    raise

    def best(self, num: int) -> list[TextSequence]:
        """For each prompt its `num` sequences with the highest mean log probability, best first; in order if all are kept."""
        samples = self.plan.samples
        chosen: list[TextSequence] = []
        for first in range(0, len(self.sequences), samples):
            group = self.sequences[first : first + samples]
            if num < samples:
                group = sorted(group, key=lambda sequence: -sequence.mean_logprob)[:num]
            chosen += group
        return chosen


def fit(prompt: Sequence[int], max_new_tokens: int | None, limits: Limits, *, prompt_name: str, max_name: str) -> int:
    """Tokens to generate for a prompt of so many tokens. ValidationFailed, in LoRAX's words, if it cannot be."""
    prompt_len = len(prompt)
    if prompt_len == 0:
        raise ValidationFailed(f"`{prompt_name}` cannot be empty", param=prompt_name)
    if max_new_tokens is not None and prompt_len + max_new_tokens > limits.max_total_tokens:
        raise too_long(
            f"`{prompt_name}` tokens + `{max_name}` must be <= {limits.max_total_tokens}. "
            f"Given: {prompt_len} `{prompt_name}` tokens and {max_new_tokens} `{max_name}`",
            prompt_name,
        )
    if prompt_len > limits.max_input_length:
        raise too_long(f"`{prompt_name}` must have less than {limits.max_input_length} tokens. Given: {prompt_len}", prompt_name)
    return max_new_tokens if max_new_tokens is not None else limits.max_total_tokens - prompt_len

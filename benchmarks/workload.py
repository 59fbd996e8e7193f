"""What the CPU benchmark asks of every engine: mixed prompt and output lengths, adapters mixed row by row."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the workload. `adapter` None is the base."""

    prompt: list[int]
    num_new: int
    adapter: str | None


def mixed(num_requests: int, adapters: list[str | None], vocab_size: int, seed: int) -> list[Request]:
    """Prompts of 16 to 128 random tokens, outputs of 8 to 96, each adapter in turn. Another seed has other prompts."""
    rng = random.Random(seed)
    return [
        Request(
            prompt=[rng.randrange(100, vocab_size) for _ in range(rng.randint(16, 128))],
            num_new=rng.randint(8, 96),
            adapter=adapters[i % len(adapters)],
        )
        for i in range(num_requests)
    ]


def num_output_tokens(requests: list[Request]) -> int:
    """Tokens that were asked for: what an engine computes beyond them is its own affair."""
    return sum(request.num_new for request in requests)

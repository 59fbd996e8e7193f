"""What is asked of every engine: prompts, lengths, which request takes which adapter, when it arrives. The same for all. No torch.

Rules of a fair run: prefix cache off, new prompts for each repeat, every adapter its own weights, end tokens ignored, greedy.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSet:
    """`count` adapters of one rank on the linears that `modules` names: "all", or "qv" (the article's size, 6.8 MB on Mistral-7B)."""

    rank: int
    modules: str
    count: int

    @property
    def name(self) -> str:
        """What rows call it."""
        return f"r{self.rank}-{self.modules}"

    def id(self, model: str, index: int) -> str:
        """Where one of them lies below the folder of adapters, which is what a server calls it."""
        return f"{model}-{self.name}/a{index:05d}"


@dataclass(frozen=True)
class Case:
    """One measurement: so many requests at once. Request i takes adapter i % num_adapters of `adapters`, or the base."""

    part: str
    name: str
    num_requests: int
    prompt_len: int
    num_new: int
    adapters: AdapterSet | None = None
    num_adapters: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens that are asked for."""
        return self.num_requests * self.num_new

    def prompts(self, vocab_size: int, repeat: int) -> list[list[int]]:
        """The prompts of one repeat; no other case or repeat has the same."""
        return prompts(self.num_requests, self.prompt_len, vocab_size, f"{self.part} {self.name} {repeat}")

    def picks(self) -> list[int | None]:
        """Each request's adapter: its number in the set, None for the base."""
        if self.adapters is None:
            return [None] * self.num_requests
        return [i % self.num_adapters for i in range(self.num_requests)]


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are."""

    num_requests: int  # throughput: all at once
    prompt_len: int
    num_new: int
    max_running: int  # sequences a step, in every engine
    max_batch_tokens: int  # tokens a step, in ours: what vLLM takes by itself on a card of 80 GB
    max_sequence_len: int
    decode_batches: tuple[int, ...]
    decode_prompt_len: int
    decode_num_new: int
    few: AdapterSet  # 25 large ones
    many: AdapterSet  # 1000 small ones
    num_registered: int  # adapters of the arrivals
    load_s: float  # seconds that each load of the arrivals lasts
    max_loras: tuple[int, ...]  # vLLM's setting, tried with `many`


FULL = Sizes(
    num_requests=768,
    prompt_len=256,
    num_new=128,
    max_running=256,
    max_batch_tokens=16384,
    max_sequence_len=2048,
    decode_batches=(1, 64, 256),
    decode_prompt_len=16,
    decode_num_new=256,
    few=AdapterSet(16, "all", 25),
    many=AdapterSet(8, "qv", 1000),
    num_registered=2000,
    load_s=60.0,
    max_loras=(64, 128, 256),
)
TINY = Sizes(
    num_requests=6,
    prompt_len=12,
    num_new=5,
    max_running=4,
    max_batch_tokens=2048,
    max_sequence_len=64,
    decode_batches=(1, 2),
    decode_prompt_len=4,
    decode_num_new=6,
    few=AdapterSet(4, "all", 3),
    many=AdapterSet(2, "qv", 5),
    num_registered=8,
    load_s=1.0,
    max_loras=(2, 4),
)


def sizes(model: str) -> Sizes:
    """The tiny model has tiny workloads."""
    return TINY if model == "tiny" else FULL


def offline_cases(part: str, of: Sizes) -> list[Case]:
    """The cases of a part that calls engines directly."""
    if part == "decode":
        return list(_decode_cases(of))
    adapters = {"offline-base": None, "offline-r16": of.few, "offline-r8": of.many}[part]
    return [throughput_case(part, of, adapters)]


def throughput_case(part: str, of: Sizes, adapters: AdapterSet | None) -> Case:
    """All requests at once, on the base or on the set's adapters in turn."""
    name = "base" if adapters is None else f"{adapters.name} x{adapters.count}"
    return Case(part, name, of.num_requests, of.prompt_len, of.num_new, adapters, adapters.count if adapters else 0)


def _decode_cases(of: Sizes) -> Iterator[Case]:
    """Short prompts, long outputs: base, one adapter, and all of the few where there are that many rows."""
    for batch in of.decode_batches:
        for num_adapters in (0, 1, of.few.count):
            if num_adapters > 1 and batch == 1:
                continue
            adapters = of.few if num_adapters else None
            name = f"decode{batch} " + (f"{adapters.name} x{num_adapters}" if adapters else "base")
            yield Case("decode", name, batch, of.decode_prompt_len, of.decode_num_new, adapters, num_adapters)


def prompts(num_prompts: int, prompt_len: int, vocab_size: int, seed: str) -> list[list[int]]:
    """Random ids, the first three (unknown, begin, end in Mistral's vocabulary) left out."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)]


def zipf(num_picks: int, num_adapters: int, alpha: float, seed: str) -> list[int]:
    """S-LoRA's kind of skew: adapter i is asked for with weight 1/(i+1)^alpha."""
    rng = random.Random(seed)
    return rng.choices(range(num_adapters), weights=[1 / (i + 1) ** alpha for i in range(num_adapters)], k=num_picks)


def poisson_times(rate: float, seconds: float, seed: str) -> list[float]:
    """Arrivals in seconds from the start: `rate` a second on average, independent of each other."""
    rng = random.Random(seed)
    times = itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())
    return list(itertools.takewhile(lambda at: at < seconds, times))

"""What a part tells an engine's program: which cases, how often, on what, until when. Written as JSON, read in the program. No torch.

Also the arithmetic that both programs share, so that they count alike.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.rows import Row
from benchmarks.gpu.workloads import Case, sizes

_WARM_UP_REQUESTS, _WARM_UP_PROMPT_LEN, _WARM_UP_NUM_NEW = 64, 64, 16


@dataclass(frozen=True)
class Plan:
    """All that a program needs."""

    model: str
    model_dir: str
    device: str
    work: str  # folder for adapters and packs
    layout: str  # ours: where to leave the base's layout (server.types.BaseLayout as msgpack)
    cases: list[Case]
    repeats: int
    deadline_at: float  # monotonic seconds; no repeat is begun that would end later
    options: dict[str, Any] = field(default_factory=dict)  # ours: fields of server.types.EngineOptions
    vllm: dict[str, Any] = field(default_factory=dict)  # vLLM: arguments of LLM beside those of the workload
    adapter_folders: dict[str, list[str]] = field(default_factory=dict)  # vLLM: set -> PEFT folders

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """As `write` left it."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> Path:
        """For `read`."""
        path.write_bytes(msgspec.json.encode(self))
        return path

    def remaining_s(self) -> float:
        """Seconds to the deadline, at least one."""
        return max(1.0, self.deadline_at - time.monotonic())

    def engine_options(self) -> Any:
        """Ours: server.types.EngineOptions. msgspec.ValidationError names an option that there is not or that is of a wrong type."""
        from server.types import EngineOptions

        unknown = sorted(self.options.keys() - set(EngineOptions.__struct_fields__))
        if unknown:
            allowed = ", ".join(sorted(EngineOptions.__struct_fields__))
            raise ValueError(f"--option {unknown[0]}: there is no such engine option; there are {allowed}")
        return msgspec.convert(default_options(self) | self.options, type=EngineOptions, strict=False)


def default_options(plan: Plan) -> dict[str, Any]:
    """Ours: what the workloads ask for; memory is the engine's own choice."""
    of = sizes(plan.model)
    return {
        "model_dir": plan.model_dir,
        "device": plan.device,
        "max_batch_size": of.max_running,
        "max_batch_tokens": of.max_batch_tokens,
        "max_sequence_len": of.max_sequence_len,
        "prefix_caching": False,
    }


def repeats(plan: Plan) -> Iterator[tuple[Case, int]]:
    """(case, repeat) in the order to run them: every case once, then again while there is time for another round of the same length."""
    for repeat in range(1, plan.repeats + 1):
        started_at = time.monotonic()
        for case in plan.cases:
            yield case, repeat
        round_s = time.monotonic() - started_at
        if time.monotonic() + round_s > plan.deadline_at:
            if repeat < plan.repeats:
                print(f"no time for more than {repeat} of {plan.repeats} repeats", flush=True)
            return


def warm_up_cases(cases: Sequence[Case]) -> list[Case]:
    """A short run with the base, one with each set, and one token of every adapter, so that all are where the engine keeps adapters."""
    short = Case("warm-up", "base", _WARM_UP_REQUESTS, _WARM_UP_PROMPT_LEN, _WARM_UP_NUM_NEW)
    longest = max(case.prompt_len + case.num_new for case in cases)
    if longest < _WARM_UP_PROMPT_LEN + _WARM_UP_NUM_NEW:
        short = replace(short, num_requests=4, prompt_len=max(1, longest - 2), num_new=2)
    warm_up = [short]
    for adapters in dict.fromkeys(case.adapters for case in cases if case.adapters):
        used = max(case.num_adapters for case in cases if case.adapters == adapters)
        one_set = replace(short, name=adapters.name, adapters=adapters, num_adapters=used)
        touch = replace(one_set, name=f"{adapters.name} touch", num_requests=used, prompt_len=min(16, short.prompt_len), num_new=1)
        warm_up += [one_set, touch]
    return warm_up


def result(case: Case, repeat: int, seconds: float) -> Row:
    """What is kept of one repeat."""
    row: Row = {
        "part": case.part,
        "case": case.name,
        "repeat": repeat,
        "num_requests": case.num_requests,
        "prompt_len": case.prompt_len,
        "num_new": case.num_new,
        "num_adapters": case.num_adapters,
        "seconds": round(seconds, 4),
        "rate": round(case.num_output_tokens / seconds, 2),
    }
    if case.adapters:
        row |= {"rank": case.adapters.rank, "modules": case.adapters.modules}
    if case.part == "decode":
        row["step_ms"] = round(1000 * seconds / case.num_new, 3)
    return row

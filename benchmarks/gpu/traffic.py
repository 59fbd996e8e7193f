"""A case as HTTP requests: its prompts as text, its adapters by the ids that the server of benchmarks.gpu.served knows them by."""

from collections.abc import Sequence

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clients import Answer, Ask, Load, run_load
from benchmarks.gpu.models import MODELS, as_text
from benchmarks.gpu.serve import MODEL_NAME
from benchmarks.gpu.workloads import Case

_TIMEOUT_S = 300.0


def send(
    bench: Bench,
    url: str,
    case: Case,
    repeat: int,
    *,
    stream: bool,
    times: Sequence[float] | None = None,
    picks: Sequence[int | None] | None = None,
) -> list[Answer]:
    """The case's requests, all at once or each at its time, and their answers. `picks` in place of the case's own: adapters by number."""
    prompts = case.prompts(MODELS[bench.model]["vocab_size"], repeat)
    asks = [
        Ask(at, as_text(prompt), case.num_new, case.adapters.id(bench.model, pick) if case.adapters and pick is not None else None)
        for at, prompt, pick in zip(times or [0.0] * len(prompts), prompts, picks or case.picks(), strict=True)
    ]
    return run_load(Load(url, MODEL_NAME, asks, stream, bench.num_clients, _TIMEOUT_S))


def seconds_of(answers: Sequence[Answer]) -> float:
    """From the first request sent to the last answer read."""
    return max(answer.done_at for answer in answers) - min(answer.sent_at for answer in answers)

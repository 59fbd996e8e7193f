"""`python -m server bench`: every request is counted once, and the numbers are those of what was sent."""

import pytest

from server.commands.bench import Sent, percentile, summarize
from tests.server.api.live import LiveServer
from tests.server.api.test_adapters import write_adapter
from tests.server.commands.conftest import Run


def test_numbers_of_a_run(live: LiveServer, run: Run) -> None:
    for name in ("left", "right"):
        write_adapter(live.folder / "adapters" / name, seed=len(name))
    before = len(live.seen("Submit"))
    ran = run("bench", "--requests", "12", "--concurrency", "3", "--adapters", "left,right", "--max-tokens", "8", "--json")
    assert ran.status == 0, ran.err
    report, sent = ran.json, live.seen("Submit")[before:]
    assert (report["requests"], report["failed"], report["models"]) == (12, 0, 3) and len(sent) == 12
    by_adapter = [one["adapter"]["name"] if one["adapter"] else None for one in sent]
    assert {name: by_adapter.count(name) for name in (None, "left", "right")} == {None: 4, "left": 4, "right": 4}
    assert all(one["params"]["max_new_tokens"] == 8 for one in sent)
    assert report["output_tokens_per_s"] == pytest.approx(12 * 8 / report["duration_s"], rel=0.01)
    assert 0 < report["first_token_s"]["p50"] <= report["first_token_s"]["p99"]
    assert len({tuple(one["token_ids"]) for one in sent}) == 12  # no prompt twice: a prefix cache would flatter


def test_failures_are_counted_and_end_with_status_1(live: LiveServer, run: Run) -> None:
    live.control(fail="the engine could not", kind="GenerationFailed")
    ran = run("bench", "--requests", "3", "--concurrency", "2", "--max-tokens", "4", "--json")
    assert ran.status == 1 and ran.json["failed"] == 3 and ran.json["errors"] == {"the engine could not": 3}
    assert ran.json["first_token_s"] == {"p50": None, "p99": None}
    shown = run("bench", "--requests", "2", "--max-tokens", "4")
    assert shown.status == 1 and "2 failed: the engine could not" in shown.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--requests", "0"], "--requests must be at least 1"),
        (["--adapters", "nobody"], "there is no adapter 'nobody'"),
        (["--no-base"], "--no-base needs --adapters"),
        (["--requests", "many"], "--requests"),
    ],
)
def test_what_cannot_be_asked_for(run: Run, argv: list[str], words: str) -> None:
    refused = run("bench", *argv)
    assert refused.status == 2 and words in refused.err


def test_percentiles_are_of_the_values() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0 and percentile([], 0.5) is None
    report = summarize([Sent("m", 0.5, [0.1, 0.3], 3, 7), Sent("m", error="gone")], 2.0)
    assert (report["requests"], report["failed"], report["output_tokens_per_s"], report["requests_per_s"]) == (2, 1, 1.5, 0.5)

"""The offline parts on the tiny model, as they are called: ours for real, vLLM's program with a stand-in for vLLM."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.gpu import our_engine
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.rows import ROOT, read_rows
from benchmarks.gpu.workloads import Case
from server.types import SequenceOutput


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def run(work, out, *arguments):
    return main(["--model", "tiny", "--device", "cpu", "--work", str(work), "--out", str(out), *arguments])


def test_both_engines_on_every_case(work, tmp_path, vllm_site, capsys):
    out = tmp_path / "rows.jsonl"
    parts = ["offline-base", "offline-r16", "offline-r8", "decode"]
    assert run(work, out, "--part", *parts, "--repeats", "2", "--vllm-site", str(vllm_site())) == 0
    rows = read_rows([out])
    measured = {(row["engine"], row["part"], row["case"]) for row in rows if row["part"] != "start"}
    cases = {(part, case) for engine, part, case in measured if engine == "ours"}
    assert len(cases) == 3 + 5 and {(engine, *case) for engine in ("ours", "vllm") for case in cases} == measured
    assert all(
        row["rate"] == pytest.approx(row["num_requests"] * row["num_new"] / row["seconds"], rel=0.05) for row in rows if "rate" in row
    )
    assert {row["repeat"] for row in rows if row["engine"] == "ours" and "repeat" in row} == {1, 2}
    assert all({"torch", "transformers"} <= row["versions"].keys() for row in rows if row["engine"] == "ours")
    assert all(row["versions"]["vllm"] == "0.0" for row in rows if row["engine"] == "vllm")
    stats = [row["stats"] for row in rows if row["engine"] == "ours" and "stats" in row]
    assert all(each["num_cached_tokens"] == 0 for each in stats)
    # Every one has weights of its own: none was folded into another. The many have a start of their own.
    assert [each["num_adapters_device"] for each in stats if each["num_adapters_device"]] == [3] * (len(stats) - 2) + [5] * 2
    starts = [json.loads(line) for line in (work / "models" / "llm.jsonl").read_text().splitlines()]
    assert [(start["enable_lora"], start["max_loras"], start["max_cpu_loras"]) for start in starts] == [
        (False, 1, None), (True, 3, 3), (True, 2, 5), (True, 4, 5),
    ]  # fmt: skip
    assert main(["--table", str(out)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert {name for name in figures if "vllm" in name} == {
        "ratio_base_to_vllm", "ratio_few_to_vllm", "ratio_many_to_vllm", "vllm_best_max_loras", "ratio_decode64_to_vllm",
    }  # fmt: skip


def test_an_engine_that_gives_too_few_tokens_is_no_result(work, tmp_path, vllm_site):
    out = tmp_path / "rows.jsonl"
    assert run(work, out, "--part", "offline-base", "--engine", "vllm", "--vllm-site", str(vllm_site(short=1))) == 1
    assert [row["part"] for row in read_rows([out])] == ["start"]


def test_what_was_measured_before_the_time_was_over_is_kept(work, tmp_path, vllm_site, capfd):
    site, out = vllm_site(), tmp_path / "rows.jsonl"
    request = site / "vllm" / "__init__.py"
    request.write_text(request.read_text().replace("time.sleep(0.002)", "time.sleep(3600 if params.max_tokens == 6 else 0)"))
    arguments = ["--part", "offline-base", "decode", "--engine", "vllm", "--vllm-site", str(site), "--limit-s", "10"]
    assert run(work, out, *arguments) == 1
    said = capfd.readouterr().out
    assert "out of time" in said and "no time left for decode1 r4-all x1" in said
    assert [row["part"] for row in read_rows([out])] == ["start", "offline-base"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--option", "max_batch=3"], "max_batch: there is no such engine option; there are adapter_device_bytes"),
        (["--option", "max_batch_size=many"], "max_batch_size"),
        (["--vllm-site", "/nowhere", "--engine", "vllm"], "--vllm-site /nowhere"),
    ],
)
def test_bad_arguments_are_named(work, tmp_path, arguments, words, capsys):
    assert run(work, tmp_path / "rows", "--part", "offline-base", *arguments) == 2
    assert words in capsys.readouterr().err


def test_vllms_program_brings_nothing_of_our_engine():
    code = "import sys, benchmarks.gpu.peer_vllm; sys.exit(str(sorted(m for m in sys.modules if m.split('.')[0] in ('server', 'torch'))))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "outputs, why",
    [
        ([SequenceOutput("0", [5, 6]), SequenceOutput("0", finish_reason="error", error="it broke"), SequenceOutput("1", [7])], "it broke"),
        ([SequenceOutput("0", [5, 6]), SequenceOutput("1", [7], finish_reason="length")], "3 tokens, not 4"),
    ],
)
def test_a_run_in_which_a_request_fails_is_no_measurement(outputs, why, monkeypatch):
    engine = object.__new__(our_engine.OurEngine)
    engine.plan = SimpleNamespace(model="tiny", remaining_s=lambda: 1.0)
    engine.core = SimpleNamespace(add=lambda request: None)
    monkeypatch.setattr(our_engine, "outputs_until_idle", lambda core, timeout_s: iter(outputs))
    with pytest.raises(RuntimeError, match=why):
        engine.run(Case("decode", "two", 2, 3, 2), 0)
    outputs[:] = [SequenceOutput("0", [5, 6], finish_reason="length"), SequenceOutput("1", [7, 8], finish_reason="length")]
    assert engine.run(Case("decode", "two", 2, 3, 2), 0) > 0

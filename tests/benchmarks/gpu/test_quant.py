"""The benchmark of quantized bases: its cases, its result and its table; the programs themselves on the tiny model."""

import json

import pytest

from benchmarks import gpu_quant
from benchmarks.gpu import models
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu_quant_table import make_result, table

MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "1",
    "python": "3.12",
    "commit": "abc",
    "code": "d",
    "model": "mistral-7b",
    "day": "2026-01-02",
}


def row(scheme: str, part: str, case: str, **values) -> dict:
    return {"scheme": scheme, "part": part, "case": case, "versions": {"torch": "2.11"}} | MACHINE | values


def rows_of(scheme: str, ms: float) -> list[dict]:
    return [
        row(scheme, "start", "in process", weight_bytes=int(2e9 * ms)),
        *(row(scheme, "decode", "decode1 base", rate=1000 / (ms + noise), step_ms=ms + noise) for noise in (0, 0.5, -0.25)),
        row(scheme, "decode", "decode64 base", rate=64000 / ms, step_ms=ms),
        row(scheme, "decode", "decode64 r16-qv x25", rate=1, step_ms=1.25 * ms),
        row(scheme, "offline", "base", rate=10000 / ms),
        row(scheme, "offline", "r16-all x25", rate=9000 / ms),
    ]


def test_the_cases_are_those_of_the_other_benchmark_and_adapters_on_q_and_v():
    names = [case.name for case in gpu_quant.cases("mistral-7b", [])]
    assert names == [
        "decode1 base",
        "decode1 r16-all x1",
        "decode64 base",
        "decode64 r16-qv x25",
        "decode64 r16-all x25",
        "base",
        "r16-all x25",
    ]
    assert [case.name for case in gpu_quant.cases("mistral-7b", ["decode1"])] == names[:2]
    assert [case.part for case in gpu_quant.cases("mistral-7b", ["offline"])] == ["offline", "offline"]


def test_a_result_has_medians_ratios_shares_and_drifts():
    text = {"part": "perplexity", "model": "m", "text": "t", "num_tokens": 9}
    drifts = [
        text | {"scheme": name, "perplexity": 20 * (1 + drift), "drift": drift} for name, drift in (("as it is", 0.0), ("int4", 0.0312))
    ]
    result = make_result([*rows_of("int4", 3.0), *rows_of("bf16", 6.0), *drifts])
    assert list(result["schemes"]) == ["bf16", "int4"]
    assert result["figures"]["int4_decode1_to_bf16"] == pytest.approx(2.0) and result["figures"]["int4_lora_share_decode64"] == 0.2
    lines = table(result).splitlines()
    assert lines[2].startswith("| bf16 | 12.0 | 6.00 | - | 6.00 | 7.50 (20%) | - | 1667 | 1500 |")
    assert lines[3].startswith("| int4 | 6.0 | 3.00 (2.00x) | - | 3.00 (2.00x) | 3.75 (20%) | - | 3333 | 3000 | +3.12% |")
    with pytest.raises(ValueError, match="there is no row of bf16"):
        make_result(rows_of("int4", 3.0))


def test_a_scheme_is_measured_in_a_process_of_its_own(tmp_path):
    arguments = ["--model", "tiny", "--device", "cpu", "--scheme", "int8", "--case", "decode1 base", "--repeats", "1", "--out",
                 str(tmp_path / "rows.jsonl"), "--work", str(tmp_path / "work"), "--option", "num_threads=1"]  # fmt: skip
    assert gpu_quant.main(arguments) == 0
    rows = read_rows([tmp_path / "rows.jsonl"])
    assert [(r["scheme"], r["case"]) for r in rows] == [("int8", "in process"), ("int8", "decode1 base")]
    config = MODELS["tiny"]
    linears = sum(num_in * num_out for _, num_in, num_out in models.linears("tiny", "all"))
    plain = 2 * config["vocab_size"] * config["hidden_size"] * 4  # embedding and head, float32
    assert linears + plain < rows[0]["weight_bytes"] < 1.1 * (linears + plain)


def test_wrong_arguments_and_no_time_are_said(tmp_path, capsys):
    out = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path)]
    assert gpu_quant.main([*out, "--scheme", "int8", "--limit-s", "1"]) == 1
    assert "int8: no time left" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text("{\n" + json.dumps({}) + "\n")
    assert gpu_quant.main(["--table", str(tmp_path / "bad.jsonl")]) == 2
    assert "line 1: not JSON" in capsys.readouterr().err

"""The benchmark of quantized bases: its cases, its result and its table; the programs themselves on the tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu_quant, gpu_quant_peer
from benchmarks.gpu import models
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu_quant_table import make_result, table
from server.model.quantization import awq

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


def beside(rows: list[dict], engine: str, card: str = "one", **more) -> list[dict]:
    return [row | {"engine": engine, "gpu_uuid": card, "boot_id": "b1", "at": 5.0} | more for row in rows]


THERE = [
    other | {"versions": {"vllm": "0.26.0"}}
    for name, ms in (("bf16", 5.0), ("awq", 4.0), ("awq-marlin", 2.5))
    for other in beside(rows_of(name, ms), "vllm")
    if other["case"] in ("decode1 base", "base")
]


def test_vllm_stands_beside_what_is_alike_and_the_faster_of_its_kernels_counts():
    ours = beside([*rows_of("bf16", 6.0), *rows_of("int4", 3.0)], "ours")
    result = gpu_quant_peer.make_result([*ours, *THERE])
    assert result["figures"] == {
        "bf16_decode1_to_vllm": pytest.approx(5 / 6, abs=1e-3), "bf16_offline_to_vllm": pytest.approx(5 / 6, abs=1e-3),
        "int4_decode1_to_vllm": pytest.approx(2.5 / 3, abs=1e-3), "int4_offline_to_vllm": pytest.approx(2.5 / 3, abs=1e-3),
    }  # fmt: skip
    lines = gpu_quant_peer.table(result).splitlines()
    assert "| int4 / awq | 3.00 / 2.50 m (0.83x) | - | - | - | - | 3333 / 4000 m (0.83x) | - |" in lines
    assert lines[-1].endswith("ours: torch 2.11; vllm: vllm 0.26.0. Of AWQ's kernels the faster, m: Marlin's.")
    assert make_result([*ours, *THERE])["schemes"].keys() == {"bf16", "int4"}  # the table of schemes has ours alone


def test_what_is_compared_with_vllm_is_of_one_card_and_one_code():
    elsewhere = beside(rows_of("int4", 1.0), "ours", "another") + beside(rows_of("int4", 1.0), "ours", code="before", at=1.0)
    with pytest.raises(ValueError, match="on one card since one boot"):
        gpu_quant_peer.make_result([*elsewhere, *THERE])
    here = beside(rows_of("int4", 5.0), "ours")
    result = gpu_quant_peer.make_result([*elsewhere, *THERE, *here])
    assert list(result["pairs"]) == ["int4"] and result["figures"]["int4_decode1_to_vllm"] == 0.5
    bf16 = beside(rows_of("bf16", 5.0), "ours", "two") + [row | {"gpu_uuid": "two"} for row in THERE if row["scheme"] == "bf16"]
    both = gpu_quant_peer.make_result([*elsewhere, *THERE, *here, *bf16])
    assert list(both["pairs"]) == ["bf16", "int4"]
    assert gpu_quant_peer.table(both).endswith(" Each line is of one card, not all of the same.")
    again = [row | {"boot_id": "b2", "at": 9.0} for row in (*THERE, *beside(rows_of("int4", 2.5), "ours"))]
    latest = gpu_quant_peer.make_result([*THERE, *here, *again])
    assert latest["figures"]["int4_decode1_to_vllm"] == 1.0 and "not all of the same" not in gpu_quant_peer.table(latest)


def test_rows_beside_vllms_make_a_table_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_quant_peer, "RESULTS", tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*THERE, *beside(rows_of("int4", 3.0), "ours")]))
    assert gpu_quant.main(["--table", str(file), "--save"]) == 0
    assert "| int4 / awq |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.json")] == ["vllm-quant-2026-01-02-abc.json"]
    assert "| int4 / awq |" in gpu_quant_peer.newest()
    file.write_text("".join(json.dumps(row) + "\n" for row in [*THERE, *beside(rows_of("bf16", 6.0), "ours", "another")]))
    assert gpu_quant.main(["--table", str(file)]) == 0  # ours has its table all the same
    printed = capsys.readouterr().out
    assert "| bf16 | 12.0 |" in printed and "no table beside vLLM: no scheme has rows of both" in printed


def test_vllm_is_asked_for_fp8_and_awq_on_the_same_cases(tmp_path, vllm_site):
    out, work = tmp_path / "rows.jsonl", tmp_path / "work"
    arguments = ["--model", "tiny", "--device", "cpu", "--engine", "vllm", "--vllm-site", str(vllm_site()), "--repeats", "1",
                 "--out", str(out), "--work", str(work)]  # fmt: skip
    assert gpu_quant.main([*arguments, "--scheme", "fp8", "awq", "awq-marlin", "int4"]) == 0
    rows = read_rows([out])
    names = [case.name for case in gpu_quant.cases("tiny", [])]
    for scheme in ("fp8", "awq", "awq-marlin"):
        measured = [row for row in rows if row["scheme"] == scheme and row["part"] != "start"]
        assert sorted(row["case"] for row in measured) == sorted(names)
        assert all(row["engine"] == "vllm" and row["versions"] == measured[0]["versions"] for row in measured)
    starts = [json.loads(line) for line in (work / "models" / "llm.jsonl").read_text().splitlines()]
    # The base has a start of its own; both sets of adapters share one, and take each other's places on the device.
    lora = [(False, 1, None), (True, 3, 6)] * 3
    assert [(start["enable_lora"], start["max_loras"], start["max_cpu_loras"]) for start in starts] == lora
    assert [(start.get("quantization"), start.get("linear_backend")) for start in starts[::2]] == [
        ("fp8", None), (None, None), (None, "marlin"),
    ]  # fmt: skip
    configs = [json.loads((Path(start["model"]) / "config.json").read_text()) for start in starts[::2]]
    assert "quantization_config" not in configs[0] and configs[1] == configs[2]
    awq.SCHEME.reader(configs[1]["quantization_config"])  # what ours reads as AWQ too
    calls = [json.loads(line) for line in (work / "models" / "calls.jsonl").read_text().splitlines()]
    there: set[str] = set()  # a set's adapters lie on the device until another set is run
    for loras, max_tokens in (({*call["loras"]}, call["max_tokens"]) for call in calls if call["loras"]):
        assert max_tokens <= 2 or loras <= there, "measured before every adapter of the call had run"
        there = there | loras if {name[:5] for name in there} == {name[:5] for name in loras} else loras


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

"""Keys and values in fewer bits: what is measured of a model's logits, and the tables that come of rows."""

import json
import math

import pytest
import torch

from benchmarks import gpu_quant, gpu_quant_kv_table
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu_quant_perplexity import _Drift, _RoundedKv
from benchmarks.gpu_quant_table import make_result, table
from server.engine.core import run_until_idle
from server.model import kv_dtype
from server.model.attention import ATTENTION_NAME
from server.types import EngineRequest, SamplingParams
from tests.benchmarks.gpu.test_quant import rows_of
from tests.server.engine.tiny_models import VOCAB, make_engine, make_model


def kv_row(name: str, drift: float) -> dict:
    about = {"part": "kv", "model": "m", "text": "t", "num_tokens": 9, "window": 3, "day": "2026-01-02", "commit": "abc"}
    errors = {"logit_error_max": 100 * drift, "logit_error_mean": 10 * drift, "logit_error_relative": 3 * drift}
    found = {"kv": name, "perplexity": 20 * (1 + drift), "drift": drift, "same_greedy": 1 - drift}
    return about | errors | found | {"versions": {"torch": "2.13.0+cpu", "triton": "3"}}


ROWS = [kv_row("float32", 0.0), kv_row("bfloat16", 0.001), kv_row("fp8", 0.02)]


def test_rounding_on_the_way_into_the_attention_is_what_the_engine_does():
    ids = torch.arange(3, 40)
    rounded = _RoundedKv(make_model("llama", attention="sdpa"))
    core, _ = make_engine(make_model("llama", attention=ATTENTION_NAME), kv_cache_dtype="fp8")
    core.add(EngineRequest("a", ids.tolist(), SamplingParams(max_new_tokens=1, num_logprobs=VOCAB, raw_logprobs=True)))
    said = torch.tensor([value for _, value in sorted(run_until_idle(core)[-1].logprobs[0].top)])
    exact, mine = (
        rounded.logits(ids.to(rounded._model.device), rounding)
        for rounding in (lambda x: x, lambda x: kv_dtype.stored(x, kv_dtype.FP8).view(kv_dtype.FP8).float())
    )
    torch.testing.assert_close(mine[-1].log_softmax(-1).cpu(), said, atol=1e-4, rtol=0)
    assert float((exact[-1].log_softmax(-1).cpu() - said).abs().max()) > 1e-2
    drift = _Drift()
    drift.add(mine, exact, ids.to(mine.device))
    found, off = drift.figures(), (mine - exact).abs()
    assert found["logit_error_max"] == pytest.approx(float(off.max()), abs=1e-4)
    assert found["logit_error_mean"] == pytest.approx(float(off.mean()), abs=1e-5)
    assert found["logit_error_relative"] == pytest.approx(float(off.norm() / (exact - exact.mean(-1, keepdim=True)).norm()), abs=1e-5)
    loss = torch.nn.functional.cross_entropy(mine[:-1], ids[1:].to(mine.device))
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), abs=1e-3)


def test_the_table_of_keys_and_values(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_quant_kv_table, "RESULTS", tmp_path)
    assert gpu_quant_kv_table.newest() == "Not measured yet."
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [kv_row("fp8", 0.5), *ROWS]))
    assert gpu_quant.main(["--table", str(tmp_path / "rows.jsonl"), "--save"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "| float32 (`auto` on a CPU) | 20.000 |  |  |  |  |  |"
    assert printed[4] == "| e4m3 (`fp8`) | 20.400 | +2.00% | 0.200 | 2.00 | 6.0% | 98.0% |"
    assert json.loads(printed[-1])["figures"] == {"kv_bfloat16_perplexity_drift": 0.001, "kv_fp8_perplexity_drift": 0.02}
    assert gpu_quant_kv_table.newest().splitlines() == printed[:7]
    with pytest.raises(ValueError, match="not of one run"):
        gpu_quant_kv_table.make_result([ROWS[0], ROWS[1] | {"commit": "other"}, ROWS[2]])
    (tmp_path / "half.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert gpu_quant.main(["--table", str(tmp_path / "half.jsonl")]) == 2


def test_speeds_with_such_a_cache_stand_by_themselves(tmp_path, capsys):
    speeds = [*rows_of("bf16", 6.0), *rows_of("bf16, fp8 KV", 3.0), *rows_of("int4", 4.0)]
    result = make_result(speeds)
    assert list(result["schemes"]) == ["bf16", "bf16, fp8 KV", "int4"]
    assert result["figures"]["bf16_fp8_kv_decode1_to_bf16"] == pytest.approx(2.0) and result["figures"]["bf16_decode1_to_bf16"] == 1.0
    assert table(result).splitlines()[3].startswith("| bf16, fp8 KV | 6.0 | 3.00 (2.00x) | - | 3.00 (2.00x) |")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*speeds, *ROWS]))
    assert gpu_quant.main(["--table", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "| bf16, fp8 KV | 6.0 |" in printed and "| e4m3 (`fp8`) | 20.400 |" in printed


def test_the_option_reaches_the_engine_and_is_named_in_the_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--model", "tiny", "--device", "cpu", "--scheme", "bf16", "--case", "decode1 base", "--repeats", "1", "--out", str(out),
                 "--work", str(tmp_path / "work"), "--option", "num_threads=1", "kv_cache_dtype=fp8"]  # fmt: skip
    assert gpu_quant.main(arguments) == 0
    rows = read_rows([out])
    assert {row["scheme"] for row in rows} == {"bf16, fp8 KV"}
    assert [row["options"]["kv_cache_dtype"] for row in rows if row["part"] == "decode"] == ["fp8"]
    assert list(make_result([*rows_of("bf16", 6.0), *[row for row in rows if row["part"] != "start"]])["schemes"]) == [
        "bf16",
        "bf16, fp8 KV",
    ]

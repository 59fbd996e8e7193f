"""Ratios are what they say, and no table is made of rows that may not stand side by side."""

import json

import pytest

from benchmarks.gpu import table
from benchmarks.gpu.rows import _seen, append_row, read_rows
from benchmarks.gpu.table import make_result, readme_table

STAMP = {
    "run": "r1", "day": "2026-11-22", "at": 1.0, "model": "mistral-7b", "gpu": "NVIDIA H100 80GB HBM3", "gpu_uuid": "GPU-1",
    "driver": "580", "boot_id": "b1", "cores": 16, "python": "3.12.3", "commit": "abc1234", "code": "c1",
}  # fmt: skip


def row(engine, part, case, rate=None, **more):
    return STAMP | {"engine": engine, "part": part, "case": case, "versions": {"torch": "2.11.0"}, "seconds": 1.0, "rate": rate} | more


ROWS = [
    row("ours", "offline-base", "base", 100.0, repeat=1),
    row("ours", "offline-base", "base", 300.0, repeat=2),
    row("ours", "offline-base", "base", 110.0, repeat=3),
    row("vllm", "offline-base", "base", 100.0, settings={}),
    row("ours", "offline-r16", "r16-all x25", 99.0),
    row("vllm", "offline-r16", "r16-all x25", 50.0, settings={"max_loras": 25}),
    row("ours", "offline-r8", "r8-qv x1000", 88.0),
    row("vllm", "offline-r8", "r8-qv x1000", 10.0, settings={"max_loras": 64}),
    row("vllm", "offline-r8", "r8-qv x1000", 20.0, settings={"max_loras": 256}),
    row("ours", "arrivals", "base", itl_p99_ms=10.0),
    row("ours", "arrivals", "zipf", itl_p99_ms=12.0, ttft_cold_p99_ms=90.0, ttft_warm_p99_ms=60.0),
    row("ours", "start", "warm", seconds_without_weights=25.0),
]


def test_figures():
    figures = make_result(ROWS)["figures"]
    assert figures == {
        "ratio_base_to_vllm": 1.1,  # the median of three
        "ratio_few_to_base": 0.9,
        "ratio_few_to_vllm": 1.98,
        "ratio_many_to_base": 0.8,
        "ratio_many_to_vllm": 4.4,  # vLLM's best
        "ratio_many_to_vllm_64": 8.8,
        "vllm_best_max_loras": 256,
        "ratio_itl_p99_to_base": 1.2,
        "ratio_ttft_p99_cold_to_warm": 1.5,
        "start_warm_s": 25.0,
    }


def test_the_newest_run_of_a_measurement_counts():
    again = [*ROWS, row("ours", "offline-base", "base", 55.0, run="r2")]
    assert make_result(again)["figures"]["ratio_base_to_vllm"] == 0.55


@pytest.mark.parametrize("field", ["gpu_uuid", "boot_id", "code", "commit", "model"])
def test_rows_that_do_not_belong_together_are_refused(field):
    with pytest.raises(ValueError, match=field):
        make_result([*ROWS, ROWS[0] | {field: "another"}])
    with pytest.raises(ValueError, match=field):
        make_result([{name: value for name, value in ROWS[0].items() if name != field}])


def test_the_table_says_what_was_not_reached_and_what_is_missing():
    text = table.table(make_result(ROWS))
    lines = {line.split(":")[0]: line for line in text.splitlines()}
    assert "0.800" in text and text.count("NOT REACHED") == 2  # many to base 0.80, itl 1.2
    assert lines["decode1, one large adapter"].endswith(">= 0.9") and "H100" in text
    markdown = readme_table(make_result(ROWS))
    assert "| ≤ 1.15 | 1.2 |" in markdown and markdown.count("not measured") == 6


def test_a_saved_result_is_named_by_day_card_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    path = table.save(make_result(ROWS))
    assert path.name == "2026-11-22-h100-abc1234.json"
    assert readme_table(json.loads(path.read_text())) == readme_table(make_result(ROWS))
    assert table.save(make_result(ROWS)) == path
    other = table.save(make_result([ROWS[0] | {"boot_id": "b2", "gpu_uuid": "GPU-2"}, ROWS[-1] | {"boot_id": "b2", "gpu_uuid": "GPU-2"}]))
    assert other.name == "2026-11-22-h100-abc1234-2.json"
    beside = table.save(make_result([row | {"gpu_uuid": "GPU-3"} for row in ROWS]))  # another card of the same machine
    assert beside.name == "2026-11-22-h100-abc1234-3.json" and table.save(make_result(ROWS)) == path
    beside.unlink()
    (tmp_path / "2026-11-21-h100-fffffff.json").write_text(path.read_text().replace("2026-11-22", "2026-11-21"))
    earlier = json.loads(path.read_text()) | {"machine": json.loads(path.read_text())["machine"] | {"commit": "fffffff", "at": -1.0}}
    (tmp_path / "2026-11-22-h100-fffffff.json").write_text(json.dumps(earlier))  # the same day, a name that comes later
    both = table.newest(tmp_path)
    assert sorted(each["machine"]["boot_id"] for each in both) == ["b1", "b2"]
    markdown = readme_table(*sorted(both, key=lambda each: each["machine"]["boot_id"]))
    assert "| card 1 | card 2 |" in markdown and "| ≤ 30 | 25 | 25 |" in markdown and "| ≤ 1.15 | 1.2 |  |" in markdown


def test_a_line_that_was_cut_off_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "rows"
    append_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_rows([path]) == [{"a": 1}]
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="line 2"):
        read_rows([path])


@pytest.mark.parametrize(("visible", "index", "asked"), [(None, 1, "1"), ("2,3", 1, "3"), ("GPU-abc", 0, "GPU-abc"), ("", 0, "0")])
def test_rows_name_the_gpu_that_was_used_where_only_some_are_visible(monkeypatch, visible, index, asked):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _seen(index) == asked

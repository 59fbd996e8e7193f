"""The prediction against what the engine reserved on a GPU, as benchmarks.gpu_memory recorded it (benchmarks/results/*-memory.json)."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu_memory import PARTS, compare

FILES = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*-memory.json"))
CASES = [(path.stem, case) for path in FILES for case in json.loads(path.read_text())["cases"]]

if CASES:  # there is nothing to compare with before somebody has run the recorder on a GPU

    @pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name} {case['model']}" for name, case in CASES])
    @pytest.mark.parametrize("part", PARTS)
    def test_each_part_is_predicted_within_five_percent(name, case, part):
        assert abs(compare(case)[part]) <= 0.05

    @pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name} {case['model']}" for name, case in CASES])
    def test_what_is_set_aside_is_enough(name, case):
        """Captured steps, workspaces and a step's own memory at its peak: what did not fit would have ended the engine."""
        assert compare(case)["set aside"] <= 1.0

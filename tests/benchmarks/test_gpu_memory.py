"""The recorder of the engine's memory, as far as it goes without a GPU: it starts, runs, and its result holds the prediction."""

import copy
import json

import pytest

from benchmarks.gpu_memory import CASES, compare, main, options_of, predicted


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("memory") / "memory.json"
    assert main(["--model", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_case_is_recorded_and_predicted(recorded):
    (case,) = recorded["cases"]
    assert recorded["benchmark"] == "gpu_memory" and len(recorded["commit"]) >= 7 and recorded["versions"]["torch"]
    assert case["options"] == options_of("tiny") and case["adapters"] == {"rank": 4, "modules": "all", "count": 2}
    found = compare(case, on_gpu=False)
    assert abs(found["weights"]) < 0.002  # rotary tables and the like
    assert (found["adapters"], found["arena"]) == (0, 0)


def test_a_wrong_prediction_would_show(recorded):
    case = copy.deepcopy(recorded["cases"][0])
    case["reserved"]["weights"] *= 2
    case["reserved"]["arena"] //= 2
    found = compare(case, on_gpu=False)
    assert found["weights"] == pytest.approx(-0.5, abs=0.01) and found["arena"] == pytest.approx(1.0, abs=0.01)


def test_the_three_cases_differ_and_fit_an_h100():
    cases = [name for name in CASES if name != "tiny"]
    assert len(cases) == 3 and len({json.dumps(options_of(name)) for name in cases}) == 3
    for name in cases:
        adapters = CASES[name].adapters
        asked = {"rank": adapters.rank, "modules": adapters.modules, "count": adapters.count}
        parts = predicted({"model": name, "options": options_of(name), "adapters": asked, "card": 84_900_000_000, "num_sms": 132})
        assert 0.5 < (sum(parts.values()) - parts["adapters"]) / 84_900_000_000 < 1.01


def test_a_case_that_fails_is_said_and_not_kept(tmp_path, capfd):
    """Here by the lack of a second, long before it is done."""
    out = tmp_path / "memory.json"
    assert main(["--model", "tiny", "--device", "cpu", "--out", str(out), "--limit-s", "0.01"]) == 1
    assert not out.exists() and "tiny: not done after 0 s" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "cpu"], "--device cpu: only --model tiny, and --out"),
        (["--model", "tiny", "--device", "cpu"], "--out must say"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err

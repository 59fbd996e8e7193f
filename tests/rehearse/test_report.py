"""The table says what the checks found, and nothing that no check found."""

import json

import pytest

from rehearse.errors import Differs, check
from rehearse.report import Report, Verdict


@pytest.fixture
def report():
    said: list[str] = []
    report = Report(say=said.append)
    report.said = said
    report.begin(1, "a step")
    return report


def test_a_line_is_proven_when_its_check_ends(report):
    with report.line("it holds") as line:
        line.detail = "seen"
    (line,) = report.lines
    assert (line.step, line.what, line.verdict, line.detail) == (1, "it holds", Verdict.PROVEN, "seen") and not report.differs


@pytest.mark.parametrize("kind", ["line", "limit"])
@pytest.mark.parametrize("error", [Differs("it does not"), RuntimeError("something else"), KeyboardInterrupt()])
def test_a_line_whose_check_fails_differs_whatever_the_error(report, kind, error):
    with pytest.raises(type(error)), getattr(report, kind)("it holds"):
        raise error
    assert report.lines[0].verdict is Verdict.DIFFERS and report.lines[0].detail and report.differs


def test_a_limit_is_no_proof(report):
    with report.limit("it cannot be shown"):
        check(True, "it can")
    assert report.lines[0].verdict is Verdict.UNPROVABLE and not report.differs


def test_a_table_without_lines_is_no_success(report):
    assert report.differs


def test_an_error_outside_of_lines_is_a_line(report):
    with report.line("it holds"):
        pass
    report.fail(RuntimeError("between"))
    assert report.differs and "between" in report.table()
    report.fail(RuntimeError("again"))
    assert len(report.lines) == 2


def test_the_table_is_by_step_and_the_json_has_every_line(report, tmp_path):
    for step in (2, 1):
        report.begin(step, "a step")
        with report.line(f"of {step}"):
            pass
    rows = report.table().splitlines()
    assert [row[0] for row in rows[2:]] == ["1", "2"] and len({row.index("proven") for row in rows[2:]}) == 1
    report.write(tmp_path / "table.json")
    assert [line["what"] for line in json.loads((tmp_path / "table.json").read_text())] == ["of 2", "of 1"]
    assert report.summary() == "2 proven"

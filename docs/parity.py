"""The table of docs/lorax.md: row by row what is the same as in LoRAX, what is better and why, what is refused and why.

Each row stands beside the test that proves it, as `pytest.mark.parity(part, what, verdict, why)`. `python -m docs.parity` (`make parity`)
runs those tests, and writes the table only if all of them pass; `make test` runs them too, and fails if the table has drifted.
"""

import sys
from dataclasses import dataclass

from docs import marks
from sizing.printing import run_tool

TESTS = marks.ROOT / "tests" / "server"
VERDICTS = ("same", "better", "refused")
PARTS = {
    "1.1": "Routes",
    "1.2": "Bodies",
    "1.3": "Errors",
    "1.4": "Parameters",
    "1.5": "Checks and their order",
    "1.6": "Answers",
    "1.7": "Streams",
    "1.8": "OpenAI's routes",
    "1.9": "Other endpoints",
    "2": "Adapters",
}


@dataclass(frozen=True)
class Row:
    """One row and the test that proves it."""

    part: str
    what: str
    verdict: str
    why: str
    test: str  # file below tests/server::function


def rows() -> list[Row]:
    """Every row, by part, in the order of the files. ValueError, naming the test, for a mark that is no row."""
    found = [_row(values, test) for values, test in marks.find("parity", TESTS)]
    if len({(row.part, row.what) for row in found}) != len(found):
        raise ValueError("two tests have a parity mark with the same part and text")
    return sorted(found, key=lambda row: list(PARTS).index(row.part))


def _row(values: tuple[str, ...], test: str) -> Row:
    part, what, verdict, why = (*values, "")[:4]
    if part not in PARTS or verdict not in VERDICTS or (verdict != "same" and not why):
        raise ValueError(f"{test}: parity(part, what, verdict, why), with part {', '.join(PARTS)} and verdict {', '.join(VERDICTS)}")
    return Row(part, what, verdict, why, test)


def table() -> str:
    """All rows as one table in Markdown."""
    columns = ("LoRAX", "here", "why", "test")
    return marks.table(columns, ((PARTS[row.part], (row.what, row.verdict, row.why, f"`{row.test}`")) for row in rows()))


def main() -> int:
    """Run the tests of all rows; write the tables if every one of them passed."""
    return marks.prove_and_write((TESTS / row.test for row in rows()), "lorax.md", may_skip=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))

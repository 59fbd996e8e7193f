"""The table of docs/faults.md: which fault, what those who meet it see, and what comes of it.

Each row stands beside the test that injects the fault, as `pytest.mark.fault(part, what, seen, outcome)`. `python -m docs.fault_table`
(`make faults`) runs those tests, and writes the table only if all of them pass and none was skipped; `make test` runs them too, and fails
if the table has drifted.
"""

import sys
from dataclasses import dataclass

from docs import marks
from sizing.printing import run_tool

TESTS = marks.ROOT / "tests"
PARTS = ("Engine", "Memory", "Files and disks", "Buckets", "Clients", "Machine")


@dataclass(frozen=True)
class Row:
    """One row and the test that injects the fault."""

    part: str
    what: str
    seen: str
    outcome: str
    test: str  # file below tests::function


def rows() -> list[Row]:
    """Every row, by part, in the order of the files. ValueError, naming the test, for a mark that is no row."""
    found = [_row(values, test) for values, test in marks.find("fault", TESTS)]
    if len({row.what for row in found}) != len(found):
        raise ValueError("two tests have a fault mark with the same text")
    return sorted(found, key=lambda row: PARTS.index(row.part))


def _row(values: tuple[str, ...], test: str) -> Row:
    if len(values) != 4 or values[0] not in PARTS or not all(values):
        raise ValueError(f"{test}: fault(part, what, seen, outcome), with part one of {', '.join(PARTS)}")
    return Row(*values, test)


def table() -> str:
    """All rows as one table in Markdown."""
    columns = ("fault, injected", "who meets it", "everybody else, and afterwards", "test")
    return marks.table(columns, ((row.part, (row.what, row.seen, row.outcome, f"`{row.test}`")) for row in rows()))


def main() -> int:
    """Run the tests of all rows; write the tables if every one of them ran and passed."""
    return marks.prove_and_write((TESTS / row.test for row in rows()), "faults.md", may_skip=False)


if __name__ == "__main__":
    sys.exit(run_tool(main))

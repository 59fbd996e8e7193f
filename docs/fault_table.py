"""The table of docs/faults.md: which fault, what those who meet it see, and what comes of it.

Each row stands beside the test that injects the fault, as `pytest.mark.fault(part, what, seen, outcome)`. `python -m docs.fault_table`
(`make faults`) runs those tests, and writes the table only if all of them pass and none was skipped; `make test` runs them too, and fails
if the table has drifted.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sizing.printing import run_tool

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
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
    found = [row for path in sorted(TESTS.rglob("test_*.py")) for row in _rows_of(path)]
    if len({row.what for row in found}) != len(found):
        raise ValueError("two tests have a fault mark with the same text")
    return sorted(found, key=lambda row: PARTS.index(row.part))


def _rows_of(path: Path) -> Iterator[Row]:
    if "pytest.mark.fault" not in (text := path.read_text()):
        return
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                test = f"{path.relative_to(TESTS)}::{node.name}"
                values = ast.literal_eval(ast.Tuple(mark.args, ast.Load()))
                if len(values) != 4 or values[0] not in PARTS or not all(values):
                    raise ValueError(f"{test}: fault(part, what, seen, outcome), with part one of {', '.join(PARTS)}")
                yield Row(*values, test)


def table() -> str:
    """All rows as one table in Markdown."""
    lines = ["| fault, injected | who meets it | everybody else, and afterwards | test |", "|---|---|---|---|"]
    part = None
    for row in rows():
        if row.part != part:
            part = row.part
            lines.append(f"| **{part}** | | | |")
        lines.append(f"| {row.what} | {row.seen} | {row.outcome} | `{row.test}` |")
    return "\n".join(lines)


def main() -> int:
    """Run the tests of all rows; write the tables if every one of them ran and passed."""
    tests = sorted({str(TESTS / row.test) for row in rows()})
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode != 0 or " skipped" in done.stdout:
        print("not every fault was injected and survived: docs/faults.md is left as it is", file=sys.stderr)
        return done.returncode or 1
    from docs.tables import main as write_tables

    return write_tables()


if __name__ == "__main__":
    sys.exit(run_tool(main))

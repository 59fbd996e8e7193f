"""The table of docs/lorax.md: row by row what is the same as in LoRAX, what is better and why, what is refused and why.

Each row stands beside the test that proves it, as `pytest.mark.parity(part, what, verdict, why)`. `python -m docs.parity` (`make parity`)
runs those tests, and writes the table only if all of them pass; `make test` runs them too, and fails if the table has drifted.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sizing.printing import run_tool

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "server"
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
    found = [row for path in sorted(TESTS.rglob("test_*.py")) for row in _rows_of(path)]
    if len({(row.part, row.what) for row in found}) != len(found):
        raise ValueError("two tests have a parity mark with the same part and text")
    return sorted(found, key=lambda row: list(PARTS).index(row.part))


def _rows_of(path: Path) -> Iterator[Row]:
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parity":
                yield _row(ast.literal_eval(ast.Tuple(mark.args, ast.Load())), f"{path.relative_to(TESTS)}::{node.name}")


def _row(values: tuple[str, ...], test: str) -> Row:
    part, what, verdict, why = (*values, "")[:4]
    if part not in PARTS or verdict not in VERDICTS or (verdict != "same" and not why):
        raise ValueError(f"{test}: parity(part, what, verdict, why), with part {', '.join(PARTS)} and verdict {', '.join(VERDICTS)}")
    return Row(part, what, verdict, why, test)


def table() -> str:
    """All rows as one table in Markdown."""
    lines = ["| LoRAX | here | why | test |", "|---|---|---|---|"]
    part = None
    for row in rows():
        if row.part != part:
            part = row.part
            lines.append(f"| **{PARTS[part]}** | | | |")
        lines.append(f"| {row.what} | {row.verdict} | {row.why} | `{row.test}` |")
    return "\n".join(lines)


def main() -> int:
    """Run the tests of all rows; write the tables if every one of them passed."""
    tests = sorted({str(TESTS / row.test) for row in rows()})
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT).returncode
    if status != 0:
        print("not every row is proven: docs/lorax.md is left as it is", file=sys.stderr)
        return status
    from docs.tables import main as write_tables

    return write_tables()


if __name__ == "__main__":
    sys.exit(run_tool(main))

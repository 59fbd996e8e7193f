"""Tables whose rows stand beside the tests that prove them, as a mark: how marks are found, and when a table may be written.

Used by `parity` (docs/lorax.md) and `fault_table` (docs/faults.md), which own what a row says.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def find(mark: str, tests: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """(the values of a `pytest.mark.MARK`, its test as "file below `tests`::function") of every one, in the order of the files."""
    for path in sorted(tests.rglob("test_*.py")):
        if f"pytest.mark.{mark}" not in (text := path.read_text()):
            continue
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == f"pytest.mark.{mark}":
                    yield ast.literal_eval(ast.Tuple(call.args, ast.Load())), f"{path.relative_to(tests)}::{node.name}"


def table(columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Markdown of (part, cells) in their order; each part has a line of its own above its rows."""
    names = list(columns)
    lines, last = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"], None
    for part, cells in rows:
        if part != last:
            last = part
            lines.append(f"| **{part}** |" + " |" * (len(names) - 1))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prove_and_write(tests: Iterable[Path], page: str, *, may_skip: bool) -> int:
    """Run the tests; write all tables if every one passed (and, where nothing may be skipped, ran). The exit status."""
    command = [sys.executable, "-m", "pytest", "-q", *sorted({str(test) for test in tests})]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode != 0 or (" skipped" in done.stdout and not may_skip):
        print(f"not every row is proven: docs/{page} is left as it is", file=sys.stderr)
        return done.returncode or 1
    from docs.tables import main as write_tables

    return write_tables()

"""The table: what was checked, how long it took, and whether it is proven, cannot be proven here, or differs.

Owns the lines and their output. A line exists because its check ran: `line` is a context, and its verdict is how the context ended. Steps
write them, `__main__` prints the table and takes the exit status from it.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path


class Verdict(StrEnum):
    """How a line's check ended."""

    PROVEN = "proven"
    UNPROVABLE = "not provable offline"
    DIFFERS = "DIFFERS"


@dataclass
class Line:
    """`what` holds, or cannot be shown here. `detail`: what was seen, filled in by the check."""

    step: int
    what: str
    verdict: Verdict
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Report:
    """`lines` in the order of their checks. `say` takes progress, a line at a time."""

    say: Callable[[str], None] = lambda line: print(line, flush=True)
    lines: list[Line] = field(default_factory=list)
    _step: int = 0

    def begin(self, step: int, title: str) -> None:
        """The step that the following lines belong to."""
        self._step = step
        self.say(f"[{step}/6] {title}")

    def progress(self, text: str) -> None:
        """Something that goes on inside a line."""
        self.say(f"        {text}")

    @contextmanager
    def line(self, what: str) -> Iterator[Line]:
        """Proven if the context ends; on an error the line says so, and the error goes on."""
        with self._timed(Line(self._step, what, Verdict.PROVEN)) as line:
            yield line

    @contextmanager
    def limit(self, what: str) -> Iterator[Line]:
        """Not provable offline, if the context, which checks that it really is not, ends."""
        with self._timed(Line(self._step, what, Verdict.UNPROVABLE)) as line:
            yield line

    @contextmanager
    def _timed(self, line: Line) -> Iterator[Line]:
        started_at = time.monotonic()
        try:
            yield line
        except BaseException as error:  # also one that is nobody's check: a line that did not end is not proven
            line.verdict, line.detail = Verdict.DIFFERS, str(error) or type(error).__name__
            raise
        finally:
            line.seconds = round(time.monotonic() - started_at, 1)
            self.lines.append(line)
            self.say(f"      {line.seconds:6.1f} s  {line.verdict}: {line.what}")

    def fail(self, error: Exception) -> None:
        """An error outside any line: a line of its own."""
        if not any(line.verdict is Verdict.DIFFERS for line in self.lines):
            self.lines.append(Line(self._step, "the step goes on to its end", Verdict.DIFFERS, detail=f"{type(error).__name__}: {error}"))

    def summary(self) -> str:
        """How many lines have which verdict."""
        return ", ".join(f"{num} {verdict}" for verdict in Verdict if (num := sum(line.verdict is verdict for line in self.lines)))

    @property
    def differs(self) -> bool:
        """Whether a check failed, or none ran."""
        return not self.lines or any(line.verdict is Verdict.DIFFERS for line in self.lines)

    def table(self) -> str:
        """As text."""
        rows = [("step", "what", "time", "verdict", "seen")]
        for line in sorted(self.lines, key=lambda line: line.step):
            rows.append((str(line.step), line.what, f"{line.seconds:.1f} s", str(line.verdict), line.detail))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * 120, *lines[1:]])

    def write(self, path: Path) -> None:
        """As JSON, a list of lines."""
        path.write_text(json.dumps([asdict(line) for line in self.lines], indent=1) + "\n")

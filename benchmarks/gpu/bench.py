"""What holds for all parts of one run: the model, where things lie, how long it may take, and the stamp of its rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Plan
from benchmarks.gpu.rows import Row, append_row


@dataclass(frozen=True)
class Bench:
    """One run of `python -m benchmarks.gpu --part`."""

    model: str
    model_dir: Path
    device: str
    work: Path  # adapters, packs, the server's store, logs
    out: Path
    stamp: Row
    repeats: int
    vllm_repeats: int
    deadline_at: float  # monotonic seconds
    options: dict[str, Any]  # fields of server.types.EngineOptions that are not the benchmark's own choice
    vllm_site: Path | None
    vllm_options: dict[str, Any]
    max_loras: tuple[int, ...]
    num_clients: int

    @property
    def layout_path(self) -> Path:
        """Where our engine, called directly, leaves the layout of this model on this device."""
        return self.work / f"layout-{self.model}-{self.device}-{self.stamp['code']}"

    def keep(self, rows: Sequence[Row]) -> None:
        """Append rows to the result, stamped."""
        for row in rows:
            append_row(self.out, self.stamp | row)

    def plan(self, cases: Sequence, **changes: Any) -> Plan:
        """A program's plan."""
        plan = Plan(
            model=self.model,
            model_dir=str(self.model_dir),
            device=self.device,
            work=str(self.work),
            layout=str(self.layout_path),
            cases=list(cases),
            repeats=self.repeats,
            deadline_at=self.deadline_at,
            options=self.options,
        )
        return replace(plan, **changes)

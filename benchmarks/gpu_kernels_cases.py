"""What benchmarks.gpu_kernels asks of the kernels: Mistral-7B's groups, adapters that fill them, rows of a step and whose they are."""

from typing import NamedTuple

import numpy as np
import torch

from server.kernels.grouped import DESC_WIDTH, NONE, GroupShape, SiteEntry, describe

LAYERS = 32
RANK_CAP = 512
DEVICE, DTYPE, ITEM = "cuda", torch.bfloat16, 2
WIDTHS = {"qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)), "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,))}
RANKS = {
    "r16 all": {"qkv": (16, 16, 16), "o": (16,), "gate_up": (16, 16), "down": (16,)},
    "r8 qv": {"qkv": (8, 0, 8), "o": (0,), "gate_up": (0, 0), "down": (0,)},
}


class Case(NamedTuple):
    """Rows of a step and whose they are: decode rows take the adapters in turn, prefill rows (`chunks`) in runs of equal length."""

    num_rows: int
    num_adapters: int
    kind: str = "r16 all"
    chunks: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"{'prefill' if self.chunks else 'decode'} {self.num_rows} rows, {self.num_adapters} adapters {self.kind}"

    @property
    def groups(self) -> list[str]:
        """The groups that these adapters touch; an engine launches nothing for others."""
        return [group for group, ranks in RANKS[self.kind].items() if any(ranks)]


# In the order of the sweep
CASES = (
    Case(64, 25), Case(256, 25), Case(1, 1), Case(2048, 8, chunks=True), Case(8192, 32, chunks=True), Case(256, 256, "r8 qv"), Case(64, 64),
    Case(256, 256), Case(64, 1), Case(256, 1), Case(64, 25, "r8 qv"), Case(2048, 32, chunks=True), Case(8192, 8, chunks=True),
)  # fmt: skip


def shape_of(group: str, layer: int) -> GroupShape:
    """The group as the model has it in this layer."""
    in_features, outs = WIDTHS[group]
    stops = np.cumsum(outs).tolist()
    columns = tuple((stop - out, stop) for stop, out in zip(stops, outs, strict=True))
    return GroupShape(in_features, columns, layer * len(WIDTHS) + list(WIDTHS).index(group))


class Adapters:
    """Adapters of one kind in an arena, all laid out alike: `a_at` and `b_at` give a factor's place behind an adapter's base."""

    def __init__(self, kind: str, num_adapters: int) -> None:
        self.a_at: dict[int, int] = {}
        self.b_at: dict[tuple[int, int], int] = {}
        rows, end = [], LAYERS * len(WIDTHS) * DESC_WIDTH * 8 // ITEM
        for layer in range(LAYERS):
            for group, ranks in RANKS[kind].items():
                shape, first, entries = shape_of(group, layer), end, []
                end += sum(ranks) * shape.in_features
                self.a_at[shape.index] = first
                for site, (rank, (start, stop)) in enumerate(zip(ranks, shape.columns, strict=True)):
                    r_start = sum(ranks[:site])
                    entries.append(SiteEntry(r_start, r_start + rank, end if rank else NONE, 0.5))
                    self.b_at[shape.index, site] = end
                    end += rank * (stop - start)
                rows.append(describe(first if any(ranks) else NONE, sum(ranks), entries, RANK_CAP))
        run_len = -(-end // 32) * 32
        arena = torch.empty(num_adapters, run_len, dtype=DTYPE, device=DEVICE).normal_(0, 0.02)  # [adapters, elements]
        header = torch.from_numpy(np.stack(rows)).flatten().view(DTYPE).to(DEVICE)
        arena[:, : len(header)] = header
        self.kind, self.arena, self.bases = kind, arena.view(-1), np.arange(num_adapters, dtype=np.int64) * run_len

    def exact(self, y: torch.Tensor, x: torch.Tensor, of_row: np.ndarray, shape: GroupShape) -> torch.Tensor:
        """The formula in float64: y [rows, sum of outs] with the deltas of x [rows, in]; of_row [rows]: each row's adapter."""
        y, ranks = y.double(), RANKS[self.kind][list(WIDTHS)[shape.index % len(WIDTHS)]]
        for adapter in np.unique(of_row):
            rows, base = torch.from_numpy(np.flatnonzero(of_row == adapter)).to(DEVICE), int(self.bases[adapter])
            a_at = base + self.a_at[shape.index]
            for site, (rank, (start, stop)) in enumerate(zip(ranks, shape.columns, strict=True)):
                a = self.arena[a_at : a_at + rank * shape.in_features].view(rank, shape.in_features).double()
                b_at = base + self.b_at[shape.index, site]
                b = self.arena[b_at : b_at + rank * (stop - start)].view(rank, stop - start).double()
                y[rows, start:stop] += 0.5 * (x[rows].double() @ a.T @ b)
                a_at += rank * shape.in_features
        return y

"""Compiles the LoRA kernels for a card that need not be there, into Triton's disk cache: in parallel, in processes of their own.

It knows shapes and launch choices, no weights. Called when an image is made, before the first capture, by the benchmark, and by the test
that reads what the compiler made of the kernels.
"""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from server.kernels.grouped import RANK_CAP, GroupShape, Tiles
from server.kernels.launch import Choice


class Job(NamedTuple):
    """A pair of kernels: what tells one compilation from another."""

    capability: tuple[int, int]
    dtype: torch.dtype
    shape: GroupShape
    choice: Choice
    rank_cap: int = RANK_CAP


class _Target:
    """Stands in for Triton's driver: it names the card and touches none."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self):
        """The card to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Compiled kernels are kept by device: a number of its own for each kind of card."""
        return self._target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        """Nothing is launched."""
        return 0


def compile_pair(job: Job) -> list:
    """Triton's compiled shrink, expand and write, and of a gated MLP's group gate. It replaces the process's Triton driver: call it where
    nothing is launched."""
    from triton.runtime import driver

    from server.kernels.gated_kernels import gate_call, is_gated
    from server.kernels.grouped_kernels import expand_call, shrink_call, write_call

    driver.set_active(_Target(job.capability))
    with torch.device("meta"):
        num_rows, choice = 64, job.choice
        tiles = Tiles(
            tile_base=torch.empty(num_rows, dtype=torch.int64),
            tile_start=torch.empty(num_rows, dtype=torch.int32),
            tile_len=torch.empty(num_rows, dtype=torch.int32),
            row_ids=torch.empty(num_rows, dtype=torch.int32),
            block_m=choice.block_m,
        )
        arena = torch.empty(1, dtype=job.dtype)
        scratch = torch.empty(choice.split_k, num_rows, job.rank_cap)
        x = torch.empty(num_rows, job.shape.in_features, dtype=job.dtype)
        y = torch.empty(num_rows, job.shape.out_features, dtype=job.dtype)
        operands = arena, job.shape, tiles, scratch, choice
        calls = [shrink_call(x, *operands), expand_call(y, *operands), write_call(y, *operands)]
        if is_gated(job.shape):
            calls.append(shrink_call(x, *operands[:-1], choice._replace(pdl=False)))
            calls.append(gate_call(y, *operands, torch.empty(num_rows, y.shape[1] // 2, dtype=job.dtype)))
        return [call.compile() for call in calls]


def compile_ahead(jobs: Iterable[Job], num_processes: int | None = None) -> None:
    """Compile every job's kernels into the disk cache; whoever launches them later, in any process, finds them there."""
    spawn = multiprocessing.get_context("spawn")  # nothing of this process's CUDA state may be copied
    with ProcessPoolExecutor(num_processes or os.cpu_count(), mp_context=spawn) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: Job) -> None:
    torch.set_num_threads(1)
    compile_pair(job)

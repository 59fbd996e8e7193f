"""Which of cuBLASLt's kernels a product of so many rows is computed with, found by trying them when the engine starts.

torch takes what the heuristic puts first. At decode's few rows another proposal is up to 16% faster on an H100 (LOG.md), and which one
depends on the card: so nothing is written down here. Tried are the sizes that are captured, since launching through ctypes costs time on
the host; products of other sizes stay torch's. Called where the engine's parts are connected (engine/backends.py).
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from server.kernels.cublaslt import ALIGNMENT, CublasError, gemms

if TYPE_CHECKING:
    from server.model.product import Product

log = logging.getLogger(__name__)

Gemm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [.., in], weight [out, in] -> [.., out]
Timer = Callable[[Gemm, torch.Tensor, Sequence[torch.Tensor]], float]
WORTH = 0.98  # of torch's time: less is what two measurements of the same kernel differ by
MAX_ROWS_BESIDE = 64  # more rows, with deltas computed beside the product: what is fastest alone leaves those less of the card (LOG.md)
MOST_ERROR = 1e-2  # of the result's norm, in bfloat16 and float16
_NUM_WEIGHTS, _NUM_LAUNCHES, _NUM_REPEATS = 4, 8, 3


def use_fastest(products: Iterable["Product"], row_counts: Sequence[int]) -> None:
    """Have plain products without a bias computed with the fastest kernel there is, where they have so many rows."""
    alike: dict[torch.Size, list[Product]] = {}
    for product in products:
        if product.weight_of_all is not None and not product.is_quantized and product.bias_of_all is None:
            alike.setdefault(product.weight_of_all.shape, []).append(product)
    started_at, num_chosen = time.monotonic(), 0
    for same in alike.values():
        chosen = choose(row_counts, [product.weight_of_all for product in same])
        num_chosen += len(chosen)
        for product in same:
            product.gemms = chosen
        if chosen and same[0].weight_of_all.is_cuda:
            torch.cuda.empty_cache()  # what the trials' graphs took
    if alike:
        num_sizes, took_s = len(row_counts) * len(alike), time.monotonic() - started_at
        log.info("%d of %d sizes of products have a faster kernel than torch's first; tried in %.1f s", num_chosen, num_sizes, took_s)


@torch.inference_mode()
def choose(
    row_counts: Iterable[int],
    weights: Sequence[torch.Tensor],
    *,
    propose: Callable[[int, torch.Tensor], Sequence[Gemm]] = gemms,
    timer: Timer | None = None,
) -> dict[int, Gemm]:
    """By number of rows, what is faster than torch for weights like these, all alike [out, in]. `timer`: seconds of a product, by each of
    some weights in turn. What fails, or computes something else, is not chosen."""
    timer = timer or seconds_of
    some = [weight for weight in weights if is_aligned(weight)][:_NUM_WEIGHTS]
    chosen: dict[int, Gemm] = {}
    if not some:
        return chosen
    generator = torch.Generator(some[0].device).manual_seed(0)
    for num_rows in row_counts:
        x = torch.randn(num_rows, some[0].shape[1], dtype=some[0].dtype, device=some[0].device, generator=generator)
        try:
            right = [gemm for gemm in propose(num_rows, some[0]) if _is_right(gemm, x, some[0])]
            times = [timer(gemm, x, some) for gemm in (F.linear, *right)]
        except (RuntimeError, OSError, AttributeError) as error:  # of CUDA, out of memory, no such library, no such function in it
            log.warning("products of %d rows and more stay torch's own: %s", num_rows, error)
            return chosen
        best = min(range(len(times)), key=times.__getitem__)
        if times[best] < WORTH * times[0]:
            chosen[num_rows] = right[best - 1]
            log.debug("%d rows x %s: %.1f us for torch's %.1f", num_rows, tuple(some[0].shape), times[best] * 1e6, times[0] * 1e6)
    return chosen


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a kernel of cuBLASLt may read it as it lies."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def _is_right(gemm: Gemm, x: torch.Tensor, weight: torch.Tensor) -> bool:
    try:
        y, want = gemm(x, weight).float(), F.linear(x, weight).float()
    except CublasError:
        return False
    return bool((y - want).norm() <= MOST_ERROR * want.norm())  # never of NaN


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all trials: torch keeps a workspace for cuBLAS, up to 32 MB, for every stream that it was ever called on."""
    return torch.cuda.Stream(device)


def seconds_of(gemm: Gemm, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
    """The least of a few measurements on the GPU: some launches as a graph, which take weights in turn so that none is in the cache."""
    device = x.device
    side = _side(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        gemm(x, weights[0])
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for launch in range(_NUM_LAUNCHES):
                gemm(x, weights[launch % len(weights)])
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_NUM_REPEATS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        side.synchronize()
    return min(start.elapsed_time(stop) for start, stop in zip(events, events[1:], strict=False)) / 1000 / _NUM_LAUNCHES

"""4 bits while loading: a scale and a whole zero for each group of 128 inputs (64 or 32 if need be), codes rounded to the nearest.

A group's range is not simply from its least weight to its greatest: a narrower one cuts a few off and has finer steps for all others. Of
some ranges that one is taken whose errors have the smallest sum of fourth powers: by their squares more would be cut off, which costs
more than it gains (benchmarks/LOG.md). No data is needed.
"""

from collections.abc import Iterator

import torch

from server.kernels.quantized import QuantizedWeight, pack
from server.model.quantization.scheme import Scheme, group_for, grouped

_BOTH_ENDS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # tried first, of the whole range
_ONE_END = (0.95, 0.9, 0.85, 1.05)  # then, of what is the best so far
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights at a time: what stays in a core's cache, or fills a GPU without taking its memory


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """The best of the ranges tried for each group, nought included, in 15 steps. ValueError if the inputs cannot be in groups."""
    group = group_for(weight.shape[1])
    num_rows = max(1, _BLOCK.get(weight.device.type, _BLOCK["cpu"]) // weight.shape[1])
    rounded = [_round(grouped(rows, group)) for rows in weight.split(num_rows)]
    words, scales, zeros = (torch.cat(parts) for parts in zip(*rounded, strict=True))
    return QuantizedWeight("int4", words, scales, zeros, weight.shape[1], group)


def _round(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values [rows, groups, group] -> words, scales and zeros as a QuantizedWeight has them."""
    scales, zeros = _steps(*_best_range(values))
    codes = (values / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)
    return pack(codes.flatten(1)), scales, zeros.half()


def _best_range(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, most) [rows, groups] of the range whose error is the smallest of those tried."""
    least, most = values.amin(2).clamp_(max=0), values.amax(2).clamp_(min=0)
    buffers = torch.empty_like(values), torch.empty_like(values)
    best_error = _error(values, least, most, *buffers)
    best = torch.stack((least, most))
    for at_once in (_whole_ranges(best.clone()), _one_ended(best)):
        for tried in at_once:
            error = _error(values, tried[0], tried[1], *buffers)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best.copy_(torch.where(better, tried, best))
    return best[0], best[1]


def _whole_ranges(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from (whole * factor for factor in _BOTH_ENDS)


def _one_ended(best: torch.Tensor) -> Iterator[torch.Tensor]:
    """Ranges with one end moved, of that which is the best when the first is asked for."""
    start = best.clone()
    for factor in _ONE_END:
        yield torch.stack((start[0] * factor, start[1]))
        yield torch.stack((start[0], start[1] * factor))


def _steps(least: torch.Tensor, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (float16) and zeros (float32, whole) of ranges."""
    scales = ((most - least) / 15).clamp(min=1e-7).half()
    return scales, (-least / scales.float()).round().clamp(0, 15)


def _error(values: torch.Tensor, least: torch.Tensor, most: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The l_4 norm, squared, of each group's errors [rows, groups]; the last two are room to compute in."""
    scales, zeros = _steps(least, most)
    torch.mul(values, scales.float().reciprocal()[..., None], out=steps).add_(zeros[..., None])
    torch.round(steps, out=codes).clamp_(0, 15).sub_(steps).square_()
    return torch.linalg.vector_norm(codes, dim=2).mul_(scales.float().square())


SCHEME = Scheme("int4", 4.25, "4 bits rounded while loading, groups of 128 with fitted ranges", quantize)

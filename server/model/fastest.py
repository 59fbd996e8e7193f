"""Which of cuBLASLt's kernels a product of so many rows is computed with, found by trying them when the engine first starts on a card.

torch takes what the heuristic puts first. At decode's few rows another proposal takes up to 15% less time on an H100, and yet another where
deltas are computed beside it, launched before them or behind (LOG.md). Which one depends on the card: nothing is written down here. Tried
are the sizes of captured decode steps, since launching through ctypes costs time on the host; other sizes stay torch's. What was found is
kept beside inductor's cache of compiled code, for the next start to take. Called where the engine's parts are connected
(engine/backends.py).
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import msgspec
import torch
import torch.nn.functional as F

from server.kernels import cublaslt
from server.kernels.cublaslt import ALIGNMENT, CublasError
from server.kernels.grouped import GroupShape

if TYPE_CHECKING:
    from server.model.linear import SiteGroup

log = logging.getLogger(__name__)

Gemm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [.., in], weight [out, in] -> [.., out]
Timer = Callable[[Gemm, torch.Tensor, Sequence[torch.Tensor]], float]
WORTH = 0.98  # of torch's time: less is what two measurements of the same kernel differ by
MOST_ERROR = 1e-2  # of the result's norm, in bfloat16 and float16
_NUM_WEIGHTS, _NUM_LAUNCHES, _NUM_REPEATS = 4, 8, 4
_CACHES = 2  # weights that are read in turns are at least as many bytes as so many of the card's L2 hold
_NUM_FIRST = 6  # kernels, the fastest behind deltas, that are tried before them too
_VERSION = 4  # of what is tried and how, launch.py's tables for the deltas with it: what others have kept is tried again
# What ctypes, CUDA, a card without room, and kernels that cannot be launched raise: the products are torch's own then.
_FAILURES = (RuntimeError, OSError, AttributeError, ValueError)


class Way(NamedTuple):
    """How a product is computed. `goes_first`: where deltas are computed beside it, it is launched before them."""

    gemm: Gemm
    goes_first: bool = False


class KeptWay(msgspec.Struct, array_like=True, frozen=True):
    """A Way with its kernel as cuBLASLt has it."""

    kernel: Annotated[list[int], msgspec.Meta(min_length=8, max_length=8)]
    goes_first: bool = False


Kept = dict[str, KeptWay | None]  # by size; None: torch's own is as fast


class TimerBeside(Protocol):
    """A Timer for a group's product with its deltas computed beside it (engine.beside)."""

    def __call__(self, gemm: Gemm, x: torch.Tensor, weights: Sequence[torch.Tensor], *, goes_first: bool = False) -> float:
        """Seconds of both. RuntimeError if they cannot be had."""

    def close(self) -> None:
        """Give back what it took."""


def use_fastest(
    groups: Iterable["SiteGroup"], row_counts: Sequence[int], beside: Callable[[GroupShape], TimerBeside], *, max_trials_s: float
) -> None:
    """Have groups' plain products without a bias computed with the fastest kernel there is, where they have so many rows: alone, and beside
    the group's deltas (`beside` makes what measures that). After `max_trials_s` seconds no more are tried: sizes that are left then are
    torch's until the next start."""
    alike: dict[tuple, list[SiteGroup]] = {}
    for group in groups:
        product, weight = group.product, group.product.weight_of_all
        if weight is not None and not product.is_quantized and product.bias_of_all is None:
            alike.setdefault((*group.shape[:2], weight.dtype, weight.device), []).append(group)
    if not alike:
        return
    started_at, num_chosen = time.monotonic(), 0
    path, kept = _kept_at(next(iter(alike.values()))[0].product.weight_of_all)
    before = len(kept)
    for same in alike.values():
        weights = [group.product.weight_of_all for group in same]
        deadline_at = started_at + max_trials_s
        alone = choose(row_counts, weights, kept, deadline_at=deadline_at)
        timer, columns = beside(same[0].shape), list(same[0].shape.columns)
        try:
            timers = timer, partial(timer, goes_first=True)
            with_deltas = choose(row_counts, weights, kept, timers=timers, kind=f" beside deltas of {columns}", deadline_at=deadline_at)
        finally:
            timer.close()
        num_chosen += len(alone) + len(with_deltas)
        for group in same:
            group.product.ways, group.product.ways_beside = alone, with_deltas
    if len(kept) > before:
        _keep(path, kept)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trials' graphs took
    num_sizes, took_s = 2 * len(row_counts) * len(alike), time.monotonic() - started_at
    log.info("%d of %d sizes of products have a faster kernel than torch's first; found in %.1f s", num_chosen, num_sizes, took_s)


@torch.inference_mode()
def choose(
    row_counts: Iterable[int],
    weights: Sequence[torch.Tensor],
    kept: Kept,
    *,
    propose: Callable[[int, torch.Tensor], Sequence[Any]] = cublaslt.gemms,
    timers: Sequence[Timer] = (),
    kind: str = "",
    deadline_at: float = float("inf"),
) -> dict[int, Way]:
    """By number of rows, what is faster than torch for weights like these, all alike [out, in]; `kept` is asked first, and added to.
    `propose`: kernels, with what `kept` is to have of them as `kernel`. `timers`: seconds of a product, by each of some weights in turn,
    and, where there is a second one, of a product that goes first; `kind`: what `kept` has beside the size for others than `seconds_of`.
    What fails, or computes something else, is not chosen."""
    timers = timers or (seconds_of,)
    usable = [weight for weight in weights if is_aligned(weight)]
    some: list[torch.Tensor] = []
    chosen: dict[int, Way] = {}
    for num_rows in row_counts if usable else ():
        size = f"{usable[0].dtype} {num_rows} x {list(usable[0].shape)}{kind}"
        if size not in kept and time.monotonic() >= deadline_at:
            continue
        try:
            x = _random(num_rows, usable[0])
            if size in kept:
                gemm = kept[size] and cublaslt.gemm_of(num_rows, usable[0], kept[size].kernel)
                if gemm and _right([gemm], x, usable[0]):
                    chosen[num_rows] = Way(gemm, kept[size].goes_first)
                continue
            some = some or _turns(usable)
            way = _fastest(_right(propose(num_rows, some[0]), x, some[0]), x, some, timers, size)
        except _FAILURES as error:
            log.warning("products of %d rows and more stay torch's own: %s", num_rows, error)
            return chosen
        kept[size] = None
        if way is not None:
            chosen[num_rows] = way
            kept[size] = KeptWay(list(way.gemm.kernel), way.goes_first)
    return chosen


def _turns(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Some of a model's weights, to be read in turns such that none is still in the card's cache; copies too where it has few layers."""
    needed = -(-_CACHES * _cache_bytes(weights[0].device) // weights[0].nbytes)
    turns = list(weights[: min(_NUM_LAUNCHES, max(_NUM_WEIGHTS, needed))])
    return turns + [turns[0].clone() for _ in range(min(_NUM_LAUNCHES, needed) - len(turns))]


def _cache_bytes(device: torch.device) -> int:
    """The card's L2; 0 where torch does not say."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0


def _fastest(gemms: Sequence[Gemm], x: torch.Tensor, weights: Sequence[torch.Tensor], timers: Sequence[Timer], size: str) -> Way | None:
    """None: no way is clearly faster than torch's. All are timed by the first timer, the best of them by the second; `size` for the log."""
    if not gemms:
        return None  # float32 has none to compare
    torchs = timers[0](F.linear, x, weights)
    times = sorted((timers[0](gemm, x, weights), index) for index, gemm in enumerate(gemms))
    ways = [(seconds, Way(gemms[index])) for seconds, index in times]
    for timer in timers[1:]:
        ways += [(timer(gemms[index], x, weights), Way(gemms[index], goes_first=True)) for _, index in times[:_NUM_FIRST]]
    seconds, way = min(ways, key=lambda timed: timed[0])
    first = min((timed for timed, each in ways if each.goes_first), default=float("nan"))
    log.debug("%s: %.1f us, %.1f if it goes first, torch's %.1f", size, times[0][0] * 1e6, first * 1e6, torchs * 1e6)
    return way if seconds < WORTH * torchs else None


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a kernel of cuBLASLt may read it as it lies."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def _random(num_rows: int, weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(weight.device).manual_seed(num_rows)
    return torch.randn(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator)


def _right(gemms: Sequence[Gemm], x: torch.Tensor, weight: torch.Tensor) -> list[Gemm]:
    """Those that compute the product."""
    right, want = [], F.linear(x, weight).float()
    for gemm in gemms:
        try:
            # What it gets for its result, if it asks for so much memory, is not what another one has left there.
            torch.full(want.shape, torch.nan, dtype=x.dtype, device=x.device)
            if bool((gemm(x, weight).float() - want).norm() <= MOST_ERROR * want.norm()):  # never of NaN
                right.append(gemm)
        except CublasError:
            pass
    return right


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


def _kept_at(weight: torch.Tensor) -> tuple[Path | None, Kept]:
    """Where choices for this card and version of the library are kept (None: nowhere), and those that are; an unreadable file has none."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        card = torch.cuda.get_device_name(weight.device).replace(" ", "-")
        path = Path(cache_dir()) / f"manylora-gemms-{_VERSION}-{card}-{cublaslt.version()}.json"
    except (*_FAILURES, AssertionError) as error:
        log.info("choices of kernels are not kept: %s", error)
        return None, {}
    try:
        return path, msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return path, {}
    except (OSError, msgspec.DecodeError) as error:
        log.warning("the kept choices of kernels are made anew: %s", error)
        return path, {}


def _keep(path: Path | None, kept: Kept) -> None:
    """For the next start. Several engines may do so at once: the last one's choices stay."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(msgspec.json.encode(kept))
        part.replace(path)
    except OSError as error:
        log.warning("the choices of kernels are not kept: %s", error)

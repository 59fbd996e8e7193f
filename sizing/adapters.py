"""Bytes of a LoRA adapter on the device, from its rank and targets: factors, and the descriptor that the kernels read.

Owns what an adapter's run in the arena adds up to (server/model/arena_adapters.py lays it out) and the limit of ranks that the kernels set.
DoRA, replaced modules and added tokens come on top: give measured bytes for those.
"""

from collections.abc import Sequence

from sizing.errors import SizingError
from sizing.shape import Group, ModelShape

RANK_CAP = 512  # ranks of one adapter at one group; the same as server.kernels.grouped's
DESCRIPTOR_BYTES = 26 * 8  # a group
ALIGNMENT = 64  # of every part of a run
ALL_LINEAR = "all-linear"  # PEFT's word for it


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def targets_of(shape: ModelShape, targets: Sequence[str]) -> frozenset[str]:
    """The linears that are meant. SizingError names one that the model does not have, and those that it has."""
    names = {linear.name for group in shape.groups for linear in group}
    if list(targets) == [ALL_LINEAR]:
        return frozenset(names)
    unknown = sorted(set(targets) - names)
    if unknown or not targets:
        what = f"{shape.name} has no linear {', '.join(unknown)}" if unknown else "none was named"
        raise SizingError(f"targets: {what}. Allowed: {ALL_LINEAR}, {', '.join(sorted(names))}")
    return frozenset(targets)


def check_rank(shape: ModelShape, rank: int, targets: Sequence[str]) -> None:
    """SizingError if a rank is beyond what the kernels take at some group of the targets."""
    wanted = targets_of(shape, targets)
    most = max(sum(linear.name in wanted for linear in group) for group in shape.groups)
    limit = RANK_CAP // most
    if not 1 <= rank <= limit:
        shared = f" and {most} of these linears read one input" if most > 1 else ""
        raise SizingError(f"rank: {rank} is over the limit: the kernels take {RANK_CAP} ranks at once{shared}. Allowed: 1 to {limit}")


def adapter_bytes(shape: ModelShape, rank: int, targets: Sequence[str], item_bytes: int = 2) -> int:
    """Bytes of one adapter. SizingError names a target that there is not, or a rank over the limit."""
    check_rank(shape, rank, targets)
    wanted = targets_of(shape, targets)
    groups = list(shape.groups)
    return _aligned(len(groups) * DESCRIPTOR_BYTES) + sum(_group_bytes(group, wanted, rank, item_bytes) for group in groups)


def _group_bytes(group: Group, wanted: frozenset[str], rank: int, item_bytes: int) -> int:
    chosen = [linear for linear in group if linear.name in wanted]
    if not chosen:
        return 0
    a = _aligned(len(chosen) * rank * group[0].in_features * item_bytes)  # siblings' A lie together
    return a + sum(_aligned(rank * linear.out_features * item_bytes) for linear in chosen)

"""What one forward pass needs to know beside its tensors: the plan of its attention and which rows belong to which adapter.

The runner sets it before the pass; the patched modules read it. One `ForwardState` a model: two engines in one process never meet.
"""

from typing import TYPE_CHECKING, NamedTuple

from server.kernels.grouped import Tiles

if TYPE_CHECKING:
    from server.model.adapter import DeviceAdapter


class Segment(NamedTuple):
    """Rows [start, stop) of the batch that belong to one adapter."""

    start: int
    stop: int
    adapter: "DeviceAdapter"


class ForwardState:
    """The pass that runs now. `token_segments` part the rows of the flattened batch, `head_segments` those that reach the output head.

    With `tiles` the decoder's rows go by them instead, for kernels.grouped; embedding and head still go by segments."""

    def __init__(self) -> None:
        self.tiles: Tiles | None = None
        self.touched = -1  # bit g: some adapter of the tiles does something at group g
        self.has_gains = True  # whether one of them may scale the base's product (DoRA)
        self.apart = False  # deltas are computed beside the products, and added by whatever reads them
        self.token_segments: list[Segment] = []
        self.head_segments: list[Segment] = []

    def clear(self) -> None:
        """No adapters: the base alone."""
        self.tiles, self.touched, self.has_gains, self.apart = None, -1, True, False
        self.token_segments = self.head_segments = []

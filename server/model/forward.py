"""What one forward pass needs to know beside its tensors: the plan of its attention and which rows belong to which adapter.

The runner sets it before the pass; the patched modules read it. One `ForwardState` a model: two engines in one process never meet.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from server.model.adapter import DeviceAdapter


class Segment(NamedTuple):
    """Rows [start, stop) of the batch that belong to one adapter."""

    start: int
    stop: int
    adapter: "DeviceAdapter"


class ForwardState:
    """The pass that runs now. `token_segments` part the rows of the flattened batch, `head_segments` those that reach the output head."""

    def __init__(self) -> None:
        self.token_segments: list[Segment] = []
        self.head_segments: list[Segment] = []

    def clear(self) -> None:
        """No adapters: the base alone."""
        self.token_segments = self.head_segments = []

"""What one forward pass needs to know beside its tensors: the plan of its attention and which rows belong to which adapter.

The runner sets it before the pass; the patched modules read it. One `ForwardState` a model: two engines in one process never meet.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

from server.kernels.grouped import Tiles

if TYPE_CHECKING:
    from server.model.adapter import DeviceAdapter
    from server.model.layers import Narrow


class Segment(NamedTuple):
    """Rows [start, stop) of the batch that belong to one adapter."""

    start: int
    stop: int
    adapter: "DeviceAdapter"


class Slot:
    """The groups at one place of every layer, such as all that read the attention's input. What is true of a slot is a constant of the
    compiled layers; a number of a group's own would be another constant in each."""

    def __init__(self) -> None:
        self.groups = 0  # bit g: group g
        self.apart = False  # deltas are computed beside the products, and added by whatever reads them


class ForwardState:
    """The pass that runs now. `token_segments` part the rows of the flattened batch, `head_segments` those that reach the output head.

    With `tiles` the decoder's rows go by them instead, for kernels.grouped; embedding and head still go by segments."""

    def __init__(self) -> None:
        self.tiles: Tiles | None = None
        self.touched = -1  # bit g: some adapter of the tiles does something at group g
        self.has_gains = True  # whether one of them may scale the base's product (DoRA)
        self.narrow: Narrow | None = None  # what the last layer is wanted for; None: every row
        self.stops_at_keys = False  # attention is to write keys and values, and to end the pass (layers.KeysWritten)
        self.slots: dict[tuple[str, ...], Slot] = {}  # by the names of their sites, layers' numbers left out; in the order of a layer
        self.token_segments: list[Segment] = []
        self.head_segments: list[Segment] = []

    def slot_of(self, index: int, names: list[str]) -> Slot:
        """The slot of group `index`, whose sites are called so."""
        slot = self.slots.setdefault(tuple(re.sub(r"\.\d+\.", ".*.", name) for name in names), Slot())
        slot.groups |= 1 << index
        return slot

    def slots_touched(self, groups: int) -> int:
        """The slots that some of these groups are in: bit s for slot s, as `groups` has bit g for group g."""
        return sum(1 << position for position, slot in enumerate(self.slots.values()) if slot.groups & groups)

    def set_apart(self, slots: int) -> None:
        """Compute deltas beside the products in these slots (bits), and touch no groups but theirs."""
        self.touched = 0
        for position, slot in enumerate(self.slots.values()):
            slot.apart = bool(slots >> position & 1)
            self.touched |= slot.groups if slot.apart else 0

    def clear(self) -> None:
        """No adapters: the base alone."""
        self.set_apart(0)
        self.tiles, self.touched, self.has_gains, self.narrow = None, -1, True, None
        self.token_segments = self.head_segments = []

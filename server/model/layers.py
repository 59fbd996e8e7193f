"""The decoder's layers: which modules they are, a pass through a few of them, and the last one for the rows that are wanted alone.

Of rows whose logits nobody wants, the last layer's keys and values are all that anybody will ever read: of a step of prompts nearly a whole
layer's work less, its output projection and MLP for every row but one a sequence. Owns the stand-in for that layer. Which rows are wanted
comes from the runner (`Narrow`); layers of transformers are called as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from server.model.forward import ForwardState

if TYPE_CHECKING:
    from server.model.attention import AttentionShape


@dataclass(frozen=True, slots=True)
class Narrow:
    """Rows of a step that its last layer is wanted for. Within `alone` attention, which writes nothing, and adapters go by these."""

    rows: torch.Tensor  # int64 [wanted]
    alone: Callable[[], AbstractContextManager[None]]


class KeysWritten(Exception):  # noqa: N818 - no error: it ends a pass whose rest nobody needs
    """A layer's keys and values are in the cache. Raised by the attention seams while `ForwardState.stops_at_keys`."""


class LastLayer(nn.Module):
    """Calls a decoder layer twice: up to its attention with all rows, then as a whole with those wanted."""

    def __init__(self, layer: nn.Module, state: ForwardState) -> None:
        super().__init__()
        self.layer, self._state = layer, state

    def __getattr__(self, name: str):
        # Decoders ask their layers for what they are, such as `attention_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *args, **kwargs):
        """hidden [1, rows, hidden] and whatever else -> the same, nought in rows that nobody wants. The decoder never sees fewer rows than
        it gave: some put their output into the shape of their input."""
        narrow = self._state.narrow
        if not _is_flat(args):
            return self.layer(*args, **kwargs)
        self._state.stops_at_keys = True
        try:
            self.layer(*args, **kwargs)
        except KeysWritten:
            pass
        finally:
            self._state.stops_at_keys = False
        whole = torch.zeros_like(args[0])
        if len(narrow.rows):
            picked, named = _pick((args, tuple(kwargs.values())), whole.shape[1], narrow.rows)
            with narrow.alone():
                out = self.layer(*picked, **dict(zip(kwargs, named, strict=True)))
            whole.index_copy_(1, narrow.rows, out)
        return whole


class Layers:
    """The decoder's layers, `modules`: for each attention module the part of a ModuleList that it is in; none if they are not built so."""

    def __init__(self, modules: Mapping[str, nn.Module], attention: list[tuple[str, "AttentionShape"]], state: ForwardState) -> None:
        """`modules`: the model's by name. `attention`: names of the attention modules with what they are."""
        found: dict[str, AttentionShape] = {}
        for name, shape in attention:
            path = name.split(".")
            ends = (end for end in range(len(path), 0, -1) if isinstance(modules.get(".".join(path[: end - 1])), nn.ModuleList))
            if (end := next(ends, None)) is not None:
                found[".".join(path[:end])] = shape
        self.modules = [modules[name] for name in found]
        lists = {name.rpartition(".")[0] for name in found}
        # Layers of several lists, or with several attentions each, are called in an order that nobody here knows; where some of a list
        # have none, the last with attention need not be the last.
        self.narrows = len(lists) == 1 and len(found) == len(attention) and list(modules[min(lists)]) == self.modules
        if self.narrows:
            self._kinds = [(s, *(type(m) for m in layer.modules())) for layer, s in zip(self.modules, found.values(), strict=True)]
            parent_name, _, self._list_name = lists.pop().rpartition(".")
            self._parent, self._whole = modules[parent_name], getattr(modules[parent_name], self._list_name)
            self._narrowing = nn.ModuleList([*self.modules[:-1], LastLayer(self.modules[-1], state)])

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """While inside, the decoder ends one layer behind the first of each kind: a pass is short, and yet meets every kernel. One more,
        because the first layer's input is no other layer's output, so that its compiled code may be another."""
        if not self.narrows:
            yield
            return
        num_layers = 2 + max(self._kinds.index(kind) for kind in self._kinds)
        with self._replaced_by(nn.ModuleList(self.modules[:num_layers])):
            yield

    def narrowing(self) -> AbstractContextManager[None]:
        """While inside, the last layer does what the state's `narrow` says. Outside, modules are where and what transformers made them."""
        return self._replaced_by(self._narrowing)

    @contextmanager
    def _replaced_by(self, others: nn.ModuleList) -> Iterator[None]:
        setattr(self._parent, self._list_name, others)
        try:
            yield
        finally:
            setattr(self._parent, self._list_name, self._whole)


def _is_flat(args: tuple) -> bool:
    """Whether a layer is given its hidden states first, and as [1, rows, hidden]."""
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].dim() == 3 and args[0].shape[0] == 1


def _pick(value, num_rows: int, rows: torch.Tensor):
    """The wanted rows of whatever has all of them: [1, rows, ..], [rows, ..], and tuples of such (rotary embeddings)."""
    if isinstance(value, tuple):
        return tuple(_pick(one, num_rows, rows) for one in value)
    if isinstance(value, torch.Tensor):
        axis = 1 if value.dim() > 1 and value.shape[0] == 1 else 0
        if value.dim() > axis and value.shape[axis] == num_rows:
            return value.index_select(axis, rows)
    return value

"""The seams as operators of torch, so that a compiled layer calls them as they are: nothing of ours is traced, and nothing recompiles.

What an operator does depends on its `key`, a tensor with the number of a callee: a number of Python's would be a constant of the compiled
code, and every layer would be compiled anew (LOG.md). Used by model/linear.py and model/base.py where layers are compiled or captured.
"""

import weakref
from typing import Protocol

import torch


class Seam(Protocol):
    """What a key stands for."""

    def call(self, *tensors: torch.Tensor | None) -> torch.Tensor: ...


_seams: "weakref.WeakValueDictionary[int, Seam]" = weakref.WeakValueDictionary()
_num_keys = 0


def new_key(seam: Seam) -> torch.Tensor:
    """A key for `seam`, as long as it lives: int64 [], on the CPU."""
    global _num_keys
    _num_keys += 1
    _seams[_num_keys] = seam
    return torch.tensor(_num_keys)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return _seams[key.item()].call(x, weight, bias)


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _seams[key.item()].call_apart(x, weight, bias)


def _linear_apart_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _linear_shape(x, weight, bias, key), _linear_shape(x, weight, bias, key)


def _gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return _seams[key.item()].call_gated(x, weight, bias)


def _gated_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _add_delta(y: torch.Tensor, x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return _seams[key.item()].call(y, x)


def _add_delta_shape(y: torch.Tensor, x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(y)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return _seams[key.item()].call(q, k, v, sinks)


def _attend_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])


_library = torch.library.Library("manylora", "DEF")
for _name, _schema, _function, _shape in (
    ("linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor key) -> Tensor", _linear, _linear_shape),
    ("linear_apart", "(Tensor x, Tensor weight, Tensor? bias, Tensor key) -> (Tensor, Tensor)", _linear_apart, _linear_apart_shape),
    ("gated", "(Tensor x, Tensor weight, Tensor? bias, Tensor key) -> Tensor", _gated, _gated_shape),
    ("add_delta", "(Tensor y, Tensor x, Tensor key) -> Tensor", _add_delta, _add_delta_shape),
    ("attend", "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor key) -> Tensor", _attend, _attend_shape),
):
    _library.define(_name + _schema, tags=(torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ())
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"manylora::{_name}", _shape, lib=_library)

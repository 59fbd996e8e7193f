"""An adapter in memory: its pack read from disk, and its tensors as the patched modules use them.

Owns the views into the one block of bytes that an adapter is. Reading runs in a loader thread and touches no model; placing needs the base
(DoRA's gain is a function of its weights) and runs in the engine's thread.
"""

import math
from collections.abc import Container
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from server.adapters.pack import read_data, read_header
from server.errors import AdapterRefused
from server.kernels.lora import GroupDelta, Part, fuse
from server.model.overrides import with_parameters
from server.types import AdapterRef, PackedAdapter, PackedSite, PackedTensor

TORCH_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _view(data: torch.Tensor, tensor: PackedTensor) -> torch.Tensor:
    start = tensor.offset // data.dtype.itemsize
    return data[start : start + math.prod(tensor.shape)].view(tensor.shape)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@dataclass(slots=True)
class HostAdapter:
    """A pack in host memory: header, and data [bytes] as one tensor."""

    header: PackedAdapter
    data: torch.Tensor
    name: str

    @property
    def bytes(self) -> int:
        """Bytes that its tensors take."""
        return self.data.numel()


@dataclass(slots=True)
class EmbeddingDelta:
    """What an adapter does to the input embedding."""

    a: torch.Tensor | None = None  # [rows, rank]
    b: torch.Tensor | None = None  # [rank, hidden]
    scale: float = 1.0
    own: nn.Module | None = None  # replaces the embedding
    token_ids: torch.Tensor | None = None  # [n], sorted
    token_rows: torch.Tensor | None = None  # [n, hidden]

    def apply(self, out: torch.Tensor, ids: torch.Tensor, embed_scale: float) -> None:
        """out [rows, hidden] of the base, in place; ids [rows]. `embed_scale` is what the base's embedding multiplies rows by."""
        if self.own is not None:
            out.copy_(self.own(ids))
        if self.token_ids is not None:
            position = torch.searchsorted(self.token_ids, ids).clamp(max=len(self.token_ids) - 1)
            trained = self.token_ids[position] == ids
            out[trained] = self.token_rows[position[trained]] * embed_scale
        if self.a is not None:
            out.addmm_(self.a[ids], self.b, alpha=self.scale * embed_scale)


@dataclass(slots=True)
class DeviceAdapter:
    """An adapter as the patched modules read it. `groups` is indexed by SiteGroup.index."""

    hash: str
    bytes: int
    vocab_size: int
    groups: list[GroupDelta | None]
    embedding: EmbeddingDelta | None = None
    head_tokens: tuple[torch.Tensor, torch.Tensor] | None = None  # ids [n], rows [n, hidden]
    modules: dict[str, nn.Module] = field(default_factory=dict)  # module path -> what stands in for it
    base: int = -1  # where its run of an arena begins, in elements of the arena's type
    touched: int = 0  # bit g: it does something at group g
    has_gains: bool = False  # it scales the base's product somewhere (DoRA)
    is_grouped: bool = False  # the decoder's part of it is in the run's descriptor, for kernels.grouped
    blocks: range = range(0)  # of the arena
    copied: torch.cuda.Event | None = None  # recorded behind the copy to the device


def read_adapter(ref: AdapterRef, fingerprint: str, dtype: str) -> HostAdapter:
    """Read a pack into host memory. AdapterRefused if it is corrupt or was made for another base."""
    path = Path(ref.path)
    try:
        header, data_offset = read_header(path)
        if header.hash != ref.hash or header.fingerprint != fingerprint or header.dtype != dtype:
            raise AdapterRefused("its pack was made for another base model or data type")
        data = torch.empty(header.data_bytes, dtype=torch.uint8)
        read_data(path, data_offset, memoryview(data.numpy()))
    except AdapterRefused as refusal:
        raise AdapterRefused(f"adapter '{ref.name}': {refusal.message}") from refusal
    return HostAdapter(header, data, ref.name)


class AdapterPlacer:
    """Puts host adapters on the device that a model is on, and makes their views."""

    def __init__(self, groups, layout, modules: dict[str, nn.Module], device: torch.device, replace_module) -> None:
        self._layout, self._modules, self._device, self._replace_module = layout, modules, device, replace_module
        self._num_groups = len(groups)
        self._place_of = {name: (group, column) for group in groups for name, column in zip(group.names, group.columns, strict=True)}

    def place(self, host: HostAdapter) -> DeviceAdapter:
        """Copy the data (on a CPU it is used where it lies) and build the views."""
        adapter = DeviceAdapter(host.header.hash, host.bytes, host.header.vocab_size, [None] * self._num_groups)
        data = host.data.to(self._device, non_blocking=True).view(TORCH_DTYPE[host.header.dtype])
        self.fill(adapter, host.header, data)
        made = {t.untyped_storage().data_ptr(): t for d in adapter.groups if d is not None for p in d.parts for t in p if _is_tensor(t)}
        made.pop(data.untyped_storage().data_ptr(), None)
        adapter.bytes += sum(tensor.nbytes for tensor in made.values())  # what gains and fused factors take beside the pack's data
        return adapter

    def fill(self, adapter: DeviceAdapter, header: PackedAdapter, data: torch.Tensor, groups: Container[int] | None = None) -> None:
        """Build the views of an adapter whose data [elements] is on the device; of its linear groups only those of `groups`."""
        view = partial(_view, data)
        by_group: dict[int, list[tuple[PackedSite, str]]] = {}
        for packed in header.sites:
            site = self._layout.sites[packed.site]
            if site.kind == "embedding":
                adapter.embedding = self._embedding(packed, site.name, view)
            elif groups is None or packed.group in groups:
                by_group.setdefault(self._place_of[site.name][0].index, []).append((packed, site.name))
        for index, members in by_group.items():
            adapter.groups[index] = self._group(members, view)
        for override in header.overrides:
            parameters = {o.parameter: view(o.tensor) for o in header.overrides if o.module == override.module}
            adapter.modules[override.module] = with_parameters(self._modules[override.module], parameters)
            self._replace_module(override.module)
        for tokens in header.tokens:
            ids, order = torch.tensor(tokens.token_ids, device=self._device).sort()
            rows = view(tokens.rows)[order]
            if tokens.module == self._layout.embedding:
                adapter.embedding = adapter.embedding or EmbeddingDelta()
                adapter.embedding.token_ids, adapter.embedding.token_rows = ids, rows
            else:
                adapter.head_tokens = (ids, rows)
            adapter.bytes += rows.nbytes + ids.nbytes

    def part(self, packed: PackedSite, data: torch.Tensor) -> Part:
        """What an adapter does to one linear site, as columns [0, out)."""
        site = self._layout.sites[packed.site]
        return self._part(packed, site.name, partial(_view, data), 0)._replace(stop=site.out_features)

    def _embedding(self, packed: PackedSite, name: str, view) -> EmbeddingDelta:
        if packed.weight is not None:
            return EmbeddingDelta(own=with_parameters(self._modules[name], {"weight": view(packed.weight)}))
        return EmbeddingDelta(view(packed.a), view(packed.b), packed.scale)

    def _group(self, members: list[tuple[PackedSite, str]], view) -> GroupDelta:
        members = sorted(members, key=lambda m: self._place_of[m[1]][1])
        with_rank = [packed for packed, _ in members if packed.a is not None]
        matrix = None
        if with_rank:
            first, rank = with_rank[0].a, sum(p.rank for p in with_rank)
            matrix = view(PackedTensor(first.offset, (rank, first.shape[1])))  # siblings lie next to each other: [sum of ranks, in]
        parts, row = [], 0
        for packed, name in members:
            start, stop = self._place_of[name][1]
            part = self._part(packed, name, view, row)
            parts.append(part._replace(start=start, stop=start + packed.weight.shape[0] if packed.weight is not None else stop))
            row += packed.rank
        delta = GroupDelta(matrix, tuple(parts))
        return fuse(delta) if self._device.type == "cpu" else delta

    def _part(self, packed: PackedSite, name: str, view, row: int) -> Part:
        part = Part(0, 0, row, row + packed.rank, packed.scale)
        base_bias = getattr(self._modules[name], "bias", None)
        bias = None if packed.bias is None else view(packed.bias)
        if packed.weight is not None:
            own_bias = base_bias if packed.base_bias is None else view(packed.base_bias)
            return part._replace(weight=view(packed.weight), bias=own_bias)
        b = None if packed.b is None else view(packed.b)
        if packed.base_bias is not None:
            shift = view(packed.base_bias) - (0 if base_bias is None else base_bias)
            bias = shift if bias is None else bias + shift
        if packed.magnitude is None:
            return part._replace(b=b, bias=bias)
        gain = self._dora_gain(name, view(packed.a), b, packed.scale, view(packed.magnitude))  # [out]
        if base_bias is not None:  # the base's product has its bias in it already, and DoRA does not scale that
            kept = base_bias * (1 - gain)
            bias = kept if bias is None else bias + kept
        return part._replace(b=b * gain, gain=gain, bias=bias)

    def _weight_of(self, name: str) -> torch.Tensor:
        group = self._place_of[name][0]
        return group.product.weight(group.names.index(name))

    def _dora_gain(self, name: str, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor) -> torch.Tensor:
        """magnitude / ||W + scale B A|| by output feature (DoRA, arXiv 2402.09353, section 4.1): [out]."""
        weight = self._weight_of(name)  # [out, in]
        norm = torch.linalg.norm(weight.float() + scale * (b.T.float() @ a.float()), dim=1)
        return (magnitude.float() / norm).to(magnitude.dtype)

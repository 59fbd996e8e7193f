"""Adapters in an arena: a pack with its descriptor in page-locked memory, one copy to a run of blocks, nothing built site by site.

Owns the layout of an adapter's run (descriptor, the pack's data, then room for what is computed from the base's weights: DoRA's gains,
shifts of biases) and the stream that copies. What kernels.grouped cannot say (replaced weights and modules, too many ranks) is left to the
views of AdapterPlacer, and the runner computes such an adapter's rows apart. Reading runs in a loader thread, the rest in the engine's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from server.adapters.pack import read_data, read_header
from server.errors import AdapterRefused
from server.kernels.grouped import DESC_WIDTH, MAX_SITES, NONE, RANK_CAP, GroupShape, SiteEntry, describe
from server.memory.arena import Arena
from server.memory.blocks import BlockPool
from server.memory.slabs import HostRun, HostSlabs
from server.memory.tier import Carrier
from server.model.adapter import TORCH_DTYPE, AdapterPlacer, DeviceAdapter
from server.types import AdapterRef, BaseLayout, PackedAdapter, PackedSite


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // Arena.ALIGNMENT) * Arena.ALIGNMENT


@dataclass(frozen=True, slots=True)
class Computed:
    """A site whose gain or bias is worked out on the device: where they go, in bytes from the run's beginning (NONE: there is none)."""

    packed: PackedSite
    gain: int
    bias: int


@dataclass(slots=True)
class RunHeader:
    """How an adapter's run is laid out."""

    desc: np.ndarray | None  # int64 [groups, DESC_WIDTH]; None: the kernels cannot say it
    data_start: int  # bytes before the pack's data
    num_bytes: int
    computed: list[Computed]
    touched: int = 0  # bit g: group g


def lay_out(header: PackedAdapter, layout: BaseLayout, shapes: list[GroupShape], first_site: dict[int, int]) -> RunHeader:
    """Where everything of an adapter lies in its run. `first_site`: group -> index of its first site in the layout."""
    item_bytes = TORCH_DTYPE[header.dtype].itemsize
    data_start = _aligned(len(shapes) * DESC_WIDTH * 8)
    end = data_start + _aligned(header.data_bytes)
    by_group: dict[int, list[PackedSite]] = {}
    for packed in header.sites:
        if 0 <= packed.group < len(shapes) and layout.sites[packed.site].kind == "linear":
            by_group.setdefault(packed.group, []).append(packed)
    sayable = not header.overrides
    # In one go: a Python loop over a model's groups takes milliseconds, and the engine's thread waits for the interpreter meanwhile.
    desc = np.tile(describe(NONE, 0, ()), (len(shapes), 1))
    computed: list[Computed] = []
    for group, members in by_group.items():
        entries, rank, a = [SiteEntry() for _ in shapes[group].columns], 0, NONE
        members.sort(key=lambda packed: packed.site)
        if len(entries) > MAX_SITES or sum(p.rank for p in members) > RANK_CAP or any(p.weight is not None for p in members):
            sayable = False
            continue
        for packed in members:
            if packed.a is not None and a == NONE:
                a = (data_start + packed.a.offset) // item_bytes
            out = layout.sites[packed.site].out_features
            gain = bias = NONE
            if packed.magnitude is not None:
                gain, end = end, end + _aligned(out * item_bytes)
            if packed.magnitude is not None or packed.base_bias is not None:
                bias, end = end, end + _aligned(out * item_bytes)
                computed.append(Computed(packed, gain, bias))
            elif packed.bias is not None:
                bias = data_start + packed.bias.offset
            entries[packed.site - first_site[group]] = SiteEntry(
                r_start=rank,
                r_stop=rank + packed.rank,
                b=NONE if packed.b is None else (data_start + packed.b.offset) // item_bytes,
                scale=packed.scale,
                gain=NONE if gain == NONE else gain // item_bytes,
                bias=NONE if bias == NONE else bias // item_bytes,
            )
            rank += packed.rank
        desc[group] = describe(a, rank, entries)
    if not sayable:
        return RunHeader(None, data_start, data_start + _aligned(header.data_bytes), [])
    return RunHeader(desc, data_start, end, computed, sum(1 << group for group in by_group))


@dataclass(slots=True)
class ArenaHost:
    """An adapter in host memory, as its run of the arena will be."""

    header: PackedAdapter
    run: RunHeader
    memory: HostRun
    name: str

    @property
    def bytes(self) -> int:
        """Bytes that it takes, on the host and on the device."""
        return self.run.num_bytes


class ArenaCarrier(Carrier):
    """Moves adapters between packs, page-locked slabs and the arena."""

    places_early = True

    def __init__(
        self, layout: BaseLayout, shapes: list[GroupShape], placer: AdapterPlacer, arena: Arena, pool: BlockPool, slabs: HostSlabs
    ) -> None:
        self._layout, self._shapes, self._placer, self._arena, self._pool, self._slabs = layout, shapes, placer, arena, pool, slabs
        self._first_site: dict[int, int] = {}
        for index, site in enumerate(layout.sites):
            self._first_site.setdefault(site.group, index)
        self._stream = torch.cuda.Stream(arena.device) if arena.device.type == "cuda" else None

    def read(self, ref: AdapterRef) -> ArenaHost:
        """A pack with its descriptor. AdapterRefused if it is corrupt or was made for another base. What fails holds nothing."""
        path, memory = Path(ref.path), None
        try:
            header, data_offset = read_header(path)
            if header.hash != ref.hash or header.fingerprint != self._layout.fingerprint or header.dtype != self._layout.dtype:
                raise AdapterRefused("its pack was made for another base model or data type")
            run = lay_out(header, self._layout, self._shapes, self._first_site)
            memory = self._slabs.allocate(run.num_bytes)
            if run.desc is not None:
                memory.data[: run.desc.nbytes] = torch.from_numpy(run.desc.reshape(-1)).view(torch.uint8)
            read_data(path, data_offset, memoryview(memory.data[run.data_start : run.data_start + header.data_bytes].numpy()))
        except BaseException as error:
            if memory is not None:
                memory.release()
            if isinstance(error, AdapterRefused):
                raise AdapterRefused(f"adapter '{ref.name}': {error.message}") from error
            raise
        return ArenaHost(header, run, memory, ref.name)

    @torch.inference_mode()
    def place(self, host: ArenaHost) -> DeviceAdapter | None:
        """Take a run of blocks and start the copy; None if there is no run that is long enough."""
        num_blocks = self._arena.num_blocks_for(host.run.num_bytes)
        first = self._pool.allocate_run(num_blocks)
        if first is None:
            return None
        num_bytes, no_views = num_blocks * self._arena.block_bytes, [None] * (len(self._shapes) + 1)
        adapter = DeviceAdapter(host.header.hash, num_bytes, host.header.vocab_size, no_views)
        adapter.blocks = range(first, first + num_blocks)
        adapter.base, adapter.is_grouped = first * self._arena.block_elements, host.run.desc is not None
        adapter.touched, adapter.has_gains = host.run.touched, any(computed.gain != NONE for computed in host.run.computed)
        try:
            if self._stream is None:
                self._fill(adapter, host, first)
            else:
                # Steps that run or wait to run may still read what lay in these blocks.
                self._stream.wait_stream(torch.cuda.current_stream(self._arena.device))
                with torch.cuda.stream(self._stream):
                    self._fill(adapter, host, first)
                    adapter.copied = torch.cuda.Event()
                    adapter.copied.record(self._stream)
        except Exception:
            if self._stream is not None:
                self._stream.synchronize()
            self._pool.release(adapter.blocks)
            raise
        return adapter

    def is_whole(self, device: DeviceAdapter) -> bool:
        """Whether the copy to the device is done."""
        return device.copied is None or device.copied.query()

    def leave_host(self, host: ArenaHost) -> None:
        """Give the page-locked memory back."""
        host.memory.release()

    def leave_device(self, device: DeviceAdapter) -> None:
        """Give the blocks back; what is launched later than this waits for what still reads them."""
        self._pool.release(device.blocks)

    def _fill(self, adapter: DeviceAdapter, host: ArenaHost, first: int) -> None:
        run = self._arena.run(first, host.run.num_bytes)  # uint8 [bytes]
        run.copy_(host.memory.data, non_blocking=True)
        data = run[host.run.data_start : host.run.data_start + host.header.data_bytes].view(self._arena.dtype)
        self._placer.fill(adapter, host.header, data, {len(self._shapes)} if adapter.is_grouped else None)
        for computed in host.run.computed:
            part = self._placer.part(computed.packed, data)
            for offset, values in ((computed.gain, part.gain), (computed.bias, part.bias)):
                if offset != NONE:
                    view = run[offset : offset + _aligned(part.stop * self._arena.dtype.itemsize)].view(self._arena.dtype)[: part.stop]
                    view.copy_(values) if values is not None else view.zero_()
            if part.b is not None and part.gain is not None:  # DoRA's B has the gain in it
                offset = computed.packed.b.offset // self._arena.dtype.itemsize
                data[offset : offset + part.b.numel()].copy_(part.b.reshape(-1))

"""The pack: one file that holds an adapter as the engine maps it. Magic, version, checksum, msgpack header, aligned data.

Owns the file's format and its checks; plan.py and merge.py say what is in it, the store says where it lies, the engine maps it.

    8 bytes   magic "MANYLORA"
    uint32    version                     (all numbers little-endian)
    uint32    header's length in bytes
    32 bytes  sha256 of the header
    header    msgpack of server.types.PackedAdapter
    zeros     up to a multiple of 64
    data      header.data_bytes; every tensor begins on a multiple of 64, except that the `a` of a group follow each other without a gap
    32 bytes  sha256 of the data
"""

import hashlib
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from server.adapters.parts import DTYPES, Contents, Part, SiteParts, to_dtype
from server.adapters.plan import plan_folder
from server.adapters.refusal import refuse
from server.types import BaseLayout, PackDtype, PackedAdapter, PackedOverride, PackedSite, PackedTensor, PackedTokens

MAGIC = b"MANYLORA"
VERSION = 2
DIGEST_BYTES = 32
ALIGNMENT = 64
MAX_HEADER_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_PREFIX = struct.Struct("<8sII32s")
_SITE_TENSORS = ("a", "b", "bias", "magnitude", "base_bias", "weight")

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(PackedAdapter)


def write_pack(folder: Path, layout: BaseLayout, hash: str, out: Path) -> PackedAdapter:
    """Pack the PEFT adapter in `folder` for the base `layout`; `hash` is its content hash. `out` appears whole or not at all.

    AdapterRefused names the key or field that cannot be applied exactly. Reads the weights once, tensor by tensor."""
    with plan_folder(Path(folder), layout) as contents:
        return write_contents(contents, hash, layout.fingerprint, layout.dtype, out)


def write_contents(contents: Contents, hash: str, fingerprint: str, dtype: PackDtype, out: Path) -> PackedAdapter:
    """Lay `contents` out and write it. Called by write_pack and by merging."""
    plan = _Layout(dtype)
    sites = plan.place_sites(contents.sites)
    header = PackedAdapter(
        hash=hash,
        fingerprint=fingerprint,
        dtype=dtype,
        max_rank=max((site.rank for site in sites), default=0),
        data_bytes=0,
        vocab_size=contents.vocab_size,
        sites=sites,
        overrides=[PackedOverride(module, parameter, plan.place(part)) for module, parameter, part in contents.overrides],
        tokens=[PackedTokens(module, ids, plan.place(part)) for module, ids, part in contents.tokens],
    )
    header = msgspec.structs.replace(header, data_bytes=plan.end)
    _write_file(Path(out), _head_bytes(header), plan.order, dtype)
    return header


def read_header(path: Path) -> tuple[PackedAdapter, int]:
    """A pack's header, and where its data begins in the file (a multiple of 64). AdapterRefused if the file is not a whole, sound pack."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size:
                raise refuse("the pack is cut off")
            magic, version, header_bytes, digest = _PREFIX.unpack(prefix)
            if magic != MAGIC or version != VERSION:
                raise refuse(f"this is no pack of version {VERSION}")
            if header_bytes > min(MAX_HEADER_BYTES, size):
                raise refuse("the pack is cut off")
            raw = file.read(header_bytes)
    except OSError as error:
        raise refuse(f"the pack cannot be read ({type(error).__name__})") from error
    if hashlib.sha256(raw).digest() != digest:
        raise refuse("the pack's header is damaged")
    try:
        header = _decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise refuse("the pack's header is of another version") from error
    data_offset = _aligned(_PREFIX.size + header_bytes)
    if size != data_offset + header.data_bytes + DIGEST_BYTES:
        raise refuse(f"the pack has {size} bytes, not the {data_offset + header.data_bytes + DIGEST_BYTES} that its header says")
    for tensor in _tensors_of(header):
        item_bytes = DTYPES[header.dtype].itemsize
        end = tensor.offset + math.prod(tensor.shape) * item_bytes
        if tensor.offset < 0 or tensor.offset % item_bytes or min(tensor.shape, default=0) < 1 or end > header.data_bytes:
            raise refuse("the pack's header has a tensor outside its data")
    return header, data_offset


def read_data(path: Path, data_offset: int, into: memoryview) -> None:
    """A pack's data, which begins at `data_offset`, into a buffer of header.data_bytes. AdapterRefused if it is not what was written."""
    try:
        with Path(path).open("rb", buffering=0) as file:
            file.seek(data_offset)
            done = 0
            while done < len(into) and (count := file.readinto(into[done:])):
                done += count
            digest = file.read(DIGEST_BYTES)
    except OSError as error:
        raise refuse(f"the pack cannot be read ({type(error).__name__})") from error
    if done != len(into) or hashlib.sha256(into).digest() != digest:
        raise refuse("the pack's data is damaged")


def check_pack(path: Path) -> None:
    """Read a pack through, holding little of it. AdapterRefused as read_header and read_data."""
    header, data_offset = read_header(path)
    digest, left = hashlib.sha256(), header.data_bytes
    try:
        with Path(path).open("rb") as file:
            file.seek(data_offset)
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
            stored = file.read(DIGEST_BYTES)
    except OSError as error:
        raise refuse(f"the pack cannot be read ({type(error).__name__})") from error
    if left or stored != digest.digest():
        raise refuse("the pack's data is damaged")


def load_pack(path: Path) -> tuple[PackedAdapter, np.ndarray]:
    """A pack's header and its data [data_bytes]. AdapterRefused as read_header and read_data."""
    header, data_offset = read_header(path)
    data = np.empty(header.data_bytes, np.uint8)
    read_data(path, data_offset, memoryview(data))
    return header, data


def view_tensor(data: np.ndarray, tensor: PackedTensor, dtype: PackDtype) -> np.ndarray:
    """A tensor of a mapped pack, as it lies there."""
    stop = tensor.offset + math.prod(tensor.shape) * DTYPES[dtype].itemsize
    return data[tensor.offset : stop].view(DTYPES[dtype]).reshape(tensor.shape)


class _Layout:
    """Where each part lies. A part that is used twice (a tied head's rows) lies there once."""

    def __init__(self, dtype: PackDtype) -> None:
        self._item_bytes = DTYPES[dtype].itemsize
        self._placed: dict[int, PackedTensor] = {}
        self.order: list[tuple[int, Part]] = []
        self.end = 0

    def place(self, part: Part, adjacent: bool = False) -> PackedTensor:
        """The part's place, behind what is there already; `adjacent` leaves no gap."""
        if id(part) not in self._placed:
            offset = self.end if adjacent else _aligned(self.end)
            self.order.append((offset, part))
            self.end = offset + math.prod(part.shape) * self._item_bytes
            self._placed[id(part)] = PackedTensor(offset, tuple(part.shape))
        return self._placed[id(part)]

    def place_sites(self, sites: Iterable[SiteParts]) -> list[PackedSite]:
        """Group by group: first the `a` of its sites side by side, then everything else of them."""
        packed: list[PackedSite] = []
        for siblings in _by_group(sites):
            first = True
            for site in siblings:
                if site.a is not None:
                    self.place(site.a, adjacent=not first)
                    first = False
            for site in siblings:
                tensors = {name: self.place(getattr(site, name)) for name in _SITE_TENSORS if getattr(site, name) is not None}
                packed.append(PackedSite(site=site.site, rank=site.rank, scale=site.scale, group=site.group, **tensors))
        return sorted(packed, key=lambda site: site.site)


def _by_group(sites: Iterable[SiteParts]) -> Iterator[list[SiteParts]]:
    groups: dict[tuple[int, int], list[SiteParts]] = {}
    for site in sorted(sites, key=lambda site: site.site):
        key = (site.group, -1) if site.group >= 0 else (-1, site.site)
        groups.setdefault(key, []).append(site)
    yield from groups.values()


def _head_bytes(header: PackedAdapter) -> bytes:
    raw = _encoder.encode(header)
    head = _PREFIX.pack(MAGIC, VERSION, len(raw), hashlib.sha256(raw).digest()) + raw
    return head.ljust(_aligned(len(head)), b"\0")


def _write_file(out: Path, head: bytes, order: list[tuple[int, Part]], dtype: PackDtype) -> None:
    """Written beside `out`, synced, renamed: a reader sees all of it or nothing, whenever we are killed."""
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(head)
            position, digest = 0, hashlib.sha256()
            for offset, part in order:
                gap = bytes(offset - position)
                digest.update(gap)
                position += file.write(gap)
                for block in to_dtype(part, dtype):
                    data = block.view(np.uint8).reshape(-1).data
                    digest.update(data)
                    position += file.write(data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _tensors_of(header: PackedAdapter) -> Iterator[PackedTensor]:
    for site in header.sites:
        yield from (tensor for name in _SITE_TENSORS if (tensor := getattr(site, name)) is not None)
    yield from (override.tensor for override in header.overrides)
    yield from (tokens.rows for tokens in header.tokens)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT

"""Safetensors files, read as what they are: untrusted. A tensor is its place in the file; its numbers are read when they are used.

Owns the header's rules (https://huggingface.co/docs/safetensors: size limit, no duplicates, offsets in bounds, no overlap, no hole).
It does not know what a tensor means. Called by plan.py.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from server.adapters.parts import Part, row_ranges
from server.adapters.refusal import quote, refuse

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 32 << 20  # the format allows 100 MB; 46,000 tensors, more than any LoRA adapter has, take 9 MB
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in an open file. Read, not mapped: a file that is cut off meanwhile is then a refusal and not the process's death."""

    key: str
    dtype: np.dtype  # bfloat16 is ml_dtypes'
    shape: tuple[int, ...]
    descriptor: int
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the tensor, all of them by default."""
        stop = self.shape[0] if stop is None else stop
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        _pread(self.descriptor, rows.view(np.uint8).reshape(-1).data, self.offset + start * row_bytes, self.key)
        return rows

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor in blocks of rows."""
        for start, stop in row_ranges(self.shape):
            yield self.read(start, stop)

    def part(self) -> Part:
        """The tensor as it is."""
        return Part(self.key, self.shape, self.blocks)

    def transposed(self) -> Part:
        """A matrix the other way round; it is read whole when it is written."""
        return Part(self.key, self.shape[::-1], lambda: iter([self.read().T]))


def is_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.blocks(), other.blocks(), strict=True))


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Every tensor of the folder's weights: adapter_model.safetensors if it is there, else all *.safetensors. AdapterRefused otherwise.

    The tensors can be read while the context is open."""
    paths = [folder / WEIGHTS_NAME]
    if not paths[0].is_file():
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"adapter_model*.{suffix}"))
        if pickles:
            raise refuse(
                f"the weights are a pickle ({quote(pickles[0])}), which can run code when it is read: save them as {WEIGHTS_NAME}",
                param=pickles[0],
            )
        raise refuse(f"there is no {WEIGHTS_NAME}", param=WEIGHTS_NAME)
    tensors: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(path.open("rb", buffering=0))
            except OSError as error:
                raise refuse(f"{path.name} cannot be read ({type(error).__name__})", param=path.name) from error
            for tensor in _read_file(file.fileno(), path.name):
                if tensor.key in tensors:
                    raise refuse(f"tensor {quote(tensor.key)} is in two files", param=tensor.key)
                tensors[tensor.key] = tensor
        yield tensors


def _read_file(descriptor: int, name: str) -> Iterator[StoredTensor]:
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise refuse(f"{name} is cut off: {size} bytes", param=name)
    header_bytes = int.from_bytes(_read_bytes(descriptor, 0, 8, name), "little")
    data_offset = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_offset > size:
        raise refuse(f"{name} is cut off or no safetensors file: its header would take {header_bytes} bytes of {size}", param=name)
    header = _parse_header(_read_bytes(descriptor, 8, header_bytes, name), name)
    _check_cover([entry[2] for entry in header.values()], size - data_offset, name)
    for key, (dtype, shape, (begin, _)) in header.items():
        yield StoredTensor(key, dtype, shape, descriptor, data_offset + begin)


def _read_bytes(descriptor: int, offset: int, length: int, name: str) -> bytes:
    raw = bytearray(length)
    _pread(descriptor, memoryview(raw), offset, name)
    return bytes(raw)


def _pread(descriptor: int, target: memoryview, offset: int, name: str) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise refuse(f"{quote(name)} cannot be read ({type(error).__name__})", param=name) from error
        if count == 0:
            raise refuse(f"{quote(name)} was cut off while it was read", param=name)
        done += count


def _parse_header(raw: bytes, name: str) -> dict[str, tuple[np.dtype, tuple[int, ...], tuple[int, int]]]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        header = json.loads(raw.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else quote(str(error))
        raise refuse(f"{name}: the header is not valid ({reason})", param=name) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse(f"{name}: __metadata__ must map names to strings", param=name)
    return {key: _parse_entry(key, entry) for key, entry in header.items()}


def _parse_entry(key: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"tensor {quote(key)}: its header entry must have dtype, shape and data_offsets", param=key)
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise refuse(f"tensor {quote(key)}: dtype {quote(entry['dtype'])} is not one of {', '.join(DTYPES)}", param=key)
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(dim) is int and 0 < dim < 1 << 48 for dim in shape):
        raise refuse(f"tensor {quote(key)}: shape {quote(shape)} must be whole numbers above 0", param=key)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise refuse(f"tensor {quote(key)}: data_offsets must be two whole numbers", param=key)
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise refuse(f"tensor {quote(key)}: data_offsets do not fit its shape and dtype", param=key)
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_cover(spans: list[tuple[int, int]], data_bytes: int, name: str) -> None:
    """The tensors must cover the data exactly: no overlap, no hole, nothing beyond."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise refuse(f"{name}: the tensors overlap or leave a hole at byte {position} of the data", param=name)
        position = end
    if position != data_bytes:
        raise refuse(f"{name} is cut off or too long: its header describes {position} bytes of data, there are {data_bytes}", param=name)

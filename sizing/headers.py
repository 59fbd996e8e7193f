"""Headers of safetensors files: names, types and shapes of what they hold, and not a byte of the weights.

Owns the format's bounds (https://huggingface.co/docs/safetensors): 8 bytes of length, then JSON. Knows nothing of models.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sizing.errors import SizingError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    dtype: str  # safetensors' name: BF16, F8_E4M3, I32
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Values, whatever their type."""
        return math.prod(self.shape)


def read_headers(name: str, folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of a folder's *.safetensors. SizingError names the file that is none."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            raw = file.read(num_bytes) if 0 < num_bytes <= MAX_HEADER_BYTES else b""
        try:
            header = json.loads(raw)
            tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
            for key, entry in tensors.items():
                start, stop = entry["data_offsets"]
                found[key] = StoredTensor(entry["dtype"], tuple(entry["shape"]), stop - start)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SizingError(f"model {name}: {path.name} has no safetensors header") from None
    return found

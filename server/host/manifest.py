"""The list of a base model's files with their checksums: `manifest.json`, written last, so that where it is the model is whole.

    {"format": 1, "files": {"config.json": {"bytes": 700, "sha256": "..."}, ...}}

Other keys (who made it, from what) are for people. Owns the format and which models can be served at all; `origins` read it, `deliver`
checks files against it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")  # plain names: nothing hidden, no folders, no way out


class ModelRefused(Exception):
    """The model cannot be delivered, now or later; the message names the file or key and what is allowed."""


@dataclass(frozen=True, order=True)
class ModelFile:
    """One file of a model."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a model, sorted by name."""

    files: tuple[ModelFile, ...]

    @classmethod
    def of(cls, files: Iterable[ModelFile]) -> "Manifest":
        """ModelRefused unless the files make a model that the server could read."""
        manifest = cls(tuple(sorted(files)))
        names = {file.name for file in manifest.files}
        for file in manifest.files:
            _check(file)
        if missing := {"config.json", "tokenizer.json"} - names:
            raise ModelRefused(f"the model has no {sorted(missing)[0]}")
        if not any(name.endswith(".safetensors") for name in names):
            raise ModelRefused("the model has no *.safetensors; pickled weights are not served")
        return manifest

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """ModelRefused, naming the key, for anything that is not a manifest of this format."""
        try:
            values = json.loads(data)
        except ValueError as error:
            raise ModelRefused(f"{MANIFEST_NAME} is not JSON: {error}") from None
        if not isinstance(values, dict) or values.get("format") != MANIFEST_FORMAT:
            raise ModelRefused(f"{MANIFEST_NAME}: `format` must be {MANIFEST_FORMAT}")
        files = values.get("files")
        if not isinstance(files, dict):
            raise ModelRefused(f"{MANIFEST_NAME}: `files` must be an object of file names")
        return cls.of(_file(name, entry) for name, entry in files.items())

    def to_json(self) -> bytes:
        """The same bytes for the same files."""
        files = {file.name: {"bytes": file.size_bytes, "sha256": file.sha256} for file in self.files}
        return json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=2).encode() + b"\n"

    @property
    def digest(self) -> str:
        """Names exactly these bytes: 32 hexadecimal digits."""
        return hashlib.sha256(self.to_json()).hexdigest()[:32]

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)


def _file(name: str, entry: Any) -> ModelFile:
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
        raise ModelRefused(f"{MANIFEST_NAME}: `files.{name}` must have `bytes` and `sha256`")
    return ModelFile(name, entry["bytes"], entry["sha256"])


def _check(file: ModelFile) -> None:
    if not _NAME.fullmatch(file.name) or file.name == MANIFEST_NAME:
        raise ModelRefused(f"{MANIFEST_NAME}: {file.name!r} cannot be a model's file; letters, digits and _.+- without folders are allowed")
    if file.size_bytes < 0:
        raise ModelRefused(f"{MANIFEST_NAME}: `files.{file.name}.bytes` must not be negative")
    if not _SHA256.fullmatch(file.sha256):
        raise ModelRefused(f"{MANIFEST_NAME}: `files.{file.name}.sha256` must be 64 hexadecimal digits")

"""An adapter's folder, checked before anything is uploaded: by the same code, against the same base, as the server will.

Owns the order of the checks alone: server.sources says which files make an adapter, server.adapters what can be applied exactly.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from server.adapters.pack import write_pack
from server.commands._client import UNUSABLE, CommandFailed
from server.errors import AdapterRefused, ServerError, ValidationFailed
from server.sources.content import hash_adapter, list_folder
from server.sources.ids import split_id
from server.sources.selection import select_files
from server.types import BaseLayout


@dataclass(frozen=True)
class CheckedFolder:
    """What would be uploaded."""

    folder: Path
    names: tuple[str, ...]
    num_bytes: int
    hash: str
    rank: int


def check_folder(folder: Path, intake: dict[str, Any]) -> CheckedFolder:
    """The adapter's files. CommandFailed, with the server's own words, for what it would refuse."""
    if not folder.is_dir():
        raise CommandFailed(f"there is no folder {folder}", UNUSABLE)
    try:
        layout = msgspec.convert(intake["layout"], BaseLayout)
    except msgspec.ValidationError as error:
        raise CommandFailed(f"the server is of another version than this command: {error}") from None
    try:
        files = select_files(folder.name, list_folder(folder, folder.name), intake["max_adapter_bytes"])
        names = tuple(file.name for file in files)
        with tempfile.TemporaryDirectory(prefix="manylora-push-") as scratch:
            chosen = Path(scratch) / "adapter"
            chosen.mkdir()
            for name in names:
                (chosen / name).symlink_to((folder / name).resolve())
            content = hash_adapter(chosen, names)
            header = write_pack(chosen, layout, content, Path(scratch) / "pack")
    except AdapterRefused as error:
        message = error.message.removeprefix(f"Adapter '{folder.name}' ").removeprefix(f"Adapter '{folder.name}': ")
        raise CommandFailed(f"{folder}: {message}. Nothing was uploaded", UNUSABLE) from None
    except (ServerError, OSError) as error:
        raise CommandFailed(f"{folder} cannot be read: {error}", UNUSABLE) from None
    return CheckedFolder(folder, names, sum(file.size_bytes for file in files), content, header.max_rank)


def check_name(name: str) -> None:
    """CommandFailed unless the server would take the name."""
    try:
        split_id(name)
    except ValidationFailed as error:
        raise CommandFailed(error.message.replace("`adapter_id`", "NAME", 1), UNUSABLE) from None

"""What names an adapter's bytes: the content hash (identity everywhere in the server) and the stat signature (a cheap "unchanged").

Reads folders on disk; does not know how they came there. Called by the local source and by the store.
"""

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from server.errors import AdapterRefused
from server.sources.base import SourceFile
from server.sources.selection import CONFIG_NAME, MAX_CONFIG_BYTES, MAX_LISTED, select_files

SETTLE_S = 2.0  # far above the clock tick of any file system that keeps fractions of a second


def list_folder(folder: Path, adapter_id: str) -> list[SourceFile]:
    """The regular files directly in a folder, links followed. AdapterRefused if they are too many; OSError as the system gives it."""
    files: list[SourceFile] = []
    with os.scandir(folder) as entries:
        for num_seen, entry in enumerate(entries):
            if num_seen >= MAX_LISTED:
                raise AdapterRefused(f"Adapter '{adapter_id}': its folder has more than {MAX_LISTED} entries")
            try:
                facts = entry.stat()
            except OSError as error:  # gone since, or a link to nowhere: not there
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    continue
                raise
            if stat.S_ISREG(facts.st_mode):
                files.append(SourceFile(entry.name, facts.st_size))
    return files


def stat_signature(folder: Path, names: Sequence[str]) -> str:
    """Names the files' bytes without reading them: a file that is written or replaced gets another signature.

    Of name, size, mtime, ctime and inode; ctime since a copy that keeps mtime (`cp -p`, rsync) cannot keep it. Two writes within one tick
    of the file system's clock look alike: see is_settled."""
    lines = []
    for name in sorted(names):
        facts = os.stat(folder / name)
        lines.append(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}\0{facts.st_ino}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_settled(folder: Path, names: Sequence[str]) -> bool:
    """True once no file changed within the last seconds, so that any later write gets another stat signature. A change that is to come was
    made before the clock was set back: a write gets another time now."""
    return all(abs(time.time() - os.stat(folder / name).st_ctime) > SETTLE_S for name in names)


def hash_adapter(folder: Path, names: Sequence[str] | None = None) -> str:
    """The adapter's identity: sha256 over its config as canonical JSON and over name and sha256 of every other file that it has.

    Without `names`, of the files that `select_files` takes. AdapterRefused if the config is not a JSON object."""
    if names is None:
        names = [file.name for file in select_files(folder.name, list_folder(folder, folder.name), None)]
    total = hashlib.sha256(b"manylora adapter 1\n")
    for name in sorted(names):
        if name == CONFIG_NAME:
            digest = hashlib.sha256(_canonical_config(folder / name)).hexdigest()
        else:
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def _canonical_config(path: Path) -> bytes:
    """The config without what does not change its meaning (order of keys, blanks)."""
    with open(path, "rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterRefused(f"{CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(raw)
        canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{CONFIG_NAME} is not JSON ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise AdapterRefused(f"{CONFIG_NAME} must be a JSON object")
    return canonical

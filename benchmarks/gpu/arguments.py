"""What the command lines of the GPU's benchmarks have in common: options as NAME=VALUE, and where they write."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_WORK_BYTES = 48 << 30  # what all parts together write


def option(text: str) -> tuple[str, Any]:
    """A field and its value; argparse.ArgumentTypeError for another form."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, {"true": True, "false": False}.get(value.lower(), value)


def default_work() -> Path:
    """In memory if there is room: adapters are read from the page cache in either case."""
    shared = Path("/dev/shm")
    has_room = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > _WORK_BYTES
    return (shared if has_room else Path(tempfile.gettempdir())) / "manylora-bench"

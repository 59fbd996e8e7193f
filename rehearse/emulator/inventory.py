"""Everything that the emulator holds, service by service, from its own stores: what a deploy made and a destroy left is their difference.

Knows no service: each has `get_state`, for MiniStack's saving to a disk. `__main__` runs `answer_until_closed` beside the emulator.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SERVICES = "ministack.services."


def inventory() -> dict[str, list[str]]:
    """{"service.store": ids} of every store that is not empty."""
    held: dict[str, list[str]] = {}
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(_SERVICES) or name.count(".") != 2 or not hasattr(module, "get_state"):
            continue
        for store, content in module.get_state().items():
            if ids := _ids(content):
                held[f"{name.removeprefix(_SERVICES)}.{store}"] = ids
    return held


def _ids(content: Any) -> list[str]:
    """Keys whose value is not itself empty. A scoped store keeps (account, region, key); a list has no ids but its length."""
    content = getattr(content, "_data", content)
    if isinstance(content, Mapping):
        named = ((key[-1] if isinstance(key, tuple) else key, value) for key, value in content.items())
        return sorted(str(key) for key, value in named if value)  # also counts that are 0 again
    return [f"{len(content)} items"] if isinstance(content, (list, set, tuple)) and content else []


def answer_until_closed(state: Path) -> None:
    """For each line `NAME` on standard input, writes `state`/NAME.json, whole or not at all."""
    for line in sys.stdin:
        fresh = state / f"{line.strip()}.part"
        fresh.write_text(json.dumps(inventory()))
        fresh.rename(fresh.with_suffix(".json"))

"""What people do daily from a shell: `python -m server NAME ...`, one file a command, each with `main(argv, environ) -> exit status`.

Owns the list of commands, which is the files beside this one. `server.__main__` calls `run`, with the environment as an argument.
"""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence


def names() -> list[str]:
    """Every command there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command `argv[0]` with what follows it; its exit status, or 2 if there is no such command."""
    name, known = argv[0], names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: unknown command {ascii(name[:64])}{hint} There are: {', '.join(known)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"{__name__}.{name}").main(argv[1:], environ)

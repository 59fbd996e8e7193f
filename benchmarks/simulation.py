"""What the simulations have in common: their flags, and how a result is printed and kept."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read_flags(name: str, description: str | None, seed_help: str) -> argparse.Namespace:
    """`seed` and `save`, from the command line of `python -m benchmarks.NAME`; its page is docs/NAME.md."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    parser.add_argument("--save", action="store_true", help=f"keep the result under benchmarks/results, for docs/{name}.md")
    return parser.parse_args()


def end(name: str, flags: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the result as one line of JSON, under its day and its seed; with --save it is kept before."""
    day = datetime.now(UTC).date().isoformat()
    result = {"day": day, "seed": flags.seed} | result
    if flags.save:
        (RESULTS / f"{day}-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))

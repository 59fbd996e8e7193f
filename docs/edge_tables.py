"""Tables of docs/endpoint.md and docs/scaling.md: the routes that the gateway maps, the ways to authenticate, the simulated days. `tables`
fills them in."""

import json
from collections.abc import Callable
from pathlib import Path

from infra.routes import NOT_MAPPED, ROUTES, Access

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def gateway_routes() -> str:
    """Every route, mapped or not."""
    rows = ["| route | who | how |", "|---|---|---|"]
    for route in ROUTES:
        how = "streamed, up to `endpoint.timeout_s`" if route.generates else "whole, up to 29 s"
        who = {Access.CALLER: "callers", Access.ADMIN: "admins", Access.ANYONE: "anyone"}[route.access]
        rows.append(f"| `{route.method} {route.path}` | {who} | {how} |")
    rows += [f"| `{name}` | nobody | {reason} |" for name, reason in NOT_MAPPED.items()]
    return "\n".join(rows)


def scaling_days() -> str:
    """The newest saved run of `python -m benchmarks.scaling`."""
    result = json.loads(max(RESULTS.glob("*-scaling.json")).read_text())
    rows = [
        "| a new instance | signal | target | p95 wait, s | p99 wait, s | instance hours | p95 wait, target a tenth too high, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        waits = (row["p95_wait_s"], row["p99_wait_s"])
        cells = (f"{row['way']}, {row['boot_s']:.0f} s", row["signal"], f"{row['target']:g}", *(f"{wait:.0f}" for wait in waits))
        rows.append(f"| {' | '.join(cells)} | {row['instance_hours']:.0f} | {row['p95_wait_s_a_tenth_off']:.0f} |")
    rows.append(f"\n{result['day']}, {result['num_requests']} requests in a simulated day, seed {result['seed']}, at most 16 instances.")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {"gateway_routes": gateway_routes, "scaling_days": scaling_days}

"""Tables of docs/endpoint.md, docs/scaling.md and docs/fairness.md: the routes that the gateway maps, the simulated days and arrivals.
`tables` fills them in."""

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


def fairness_orders() -> str:
    """The newest saved run of `python -m benchmarks.fairness`."""
    result = json.loads(max(RESULTS.glob("*-fairness.json")).read_text())
    columns = ("jain", "coldest_wait_s", "longest_wait_s", "quiet_p99_s", "goodput")
    rows = [
        "| arrivals | order | Jain's index | coldest adapters' longest wait, s | longest wait of all, s "
        "| p99 wait, the noisy tenant left out, s | goodput, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    traffic = {one["name"]: f"{one['name']}; load {one['load']:g}, room for {one['room']}" for one in result["traffic"]}
    for row in result["rows"]:
        figures = (f"{row[column]:.{3 if column == 'jain' else 0 if column == 'goodput' else 1}f}" for column in columns)
        rows.append(f"| {' | '.join((traffic[row['traffic']], row['order'], *figures))} |")
    num_rows, num_blocks = (result["machine"][name] for name in ("max_batch_size", "num_blocks"))
    rows.append(f"\n{result['day']}, seed {result['seed']}, {num_rows} rows, {num_blocks} KV blocks of 16 tokens.")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "gateway_routes": gateway_routes,
    "scaling_days": scaling_days,
    "fairness_orders": fairness_orders,
}

"""How long a boot takes, by phase: boot-phases.toml, and what the fleet waits before it gives a new instance up.

Owns the table and the way that measured values come back into it. `fleet` reads it at synth; `python -m infra.boot_phases --group NAME`
replaces projections by the longest that the group's instances published.
"""

import argparse
import sys
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.config import KitConfig
from sizing.printing import run_tool

TABLE = Path(__file__).with_name("boot-phases.toml")
NAMESPACE, METRIC = "Manylora", "BootSeconds"
BAKED_IN = ("install",)  # phases that an image with the server has behind it
_SHORTEST_S, _LONGEST_S = 300, 7200


def grace_s(config: KitConfig, table: Mapping[str, Any] | None = None) -> int:
    """Seconds from launch until an instance that does not serve is ended: `fleet.grace_s`, else the phases' sum with the table's margin,
    to whole minutes."""
    if config.fleet.grace_s is not None:
        return config.fleet.grace_s
    table = table or tomllib.loads(TABLE.read_text(encoding="utf-8"))
    baked = config.image.kind != "dlami"
    total = sum(seconds for phase, seconds in table["seconds"].items() if not (baked and phase in BAKED_IN))
    wanted = min(max(total * table["margin"], _SHORTEST_S), _LONGEST_S)
    return -(-int(wanted) // 60) * 60


def read_measured(cloudwatch: Any, group: str, phases: list[str]) -> dict[str, float]:
    """The longest of each phase that the group's instances published in the last two weeks."""
    now = datetime.now(UTC)
    found = {}
    for phase in phases:
        answer = cloudwatch.get_metric_statistics(
            Namespace=NAMESPACE,
            MetricName=METRIC,
            Dimensions=[{"Name": "AutoScalingGroupName", "Value": group}, {"Name": "Step", "Value": phase}],
            StartTime=now - timedelta(days=14),
            EndTime=now + timedelta(minutes=1),
            Period=86400,
            Statistics=["Maximum"],
        )
        if points := answer["Datapoints"]:
            found[phase] = max(point["Maximum"] for point in points)
    return found


def write_measured(path: Path, measured: Mapping[str, float], group: str) -> None:
    """Replace the values of the phases that were measured; comments stay."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        phase, sign, rest = line.partition(" = ")
        if sign and phase in measured:
            comment = rest.partition("#")[2].strip()
            line = f"{phase} = {round(measured[phase])}" + (f"  # {comment}" if comment else "")
        elif phase == "measured":
            line = f"measured = true  # {', '.join(sorted(measured))}: {group}, {datetime.now(UTC):%Y-%m-%d}"
        lines.append(line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """The command line; its exit status."""
    import boto3  # not needed at synth

    parser = argparse.ArgumentParser(prog="python -m infra.boot_phases", description="Write measured boot phases into boot-phases.toml.")
    parser.add_argument("--group", required=True, help="name of the Auto Scaling group")
    parser.add_argument("--region", help="its region; none: the environment's")
    flags = parser.parse_args()
    phases = list(tomllib.loads(TABLE.read_text(encoding="utf-8"))["seconds"])
    measured = read_measured(boto3.client("cloudwatch", region_name=flags.region), flags.group, phases)
    if not measured:
        print(f"error: {flags.group} published no {METRIC} in the last 14 days", file=sys.stderr)
        return 1
    write_measured(TABLE, measured, flags.group)
    print("\n".join(f"{phase}: {seconds:.0f} s" for phase, seconds in measured.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))

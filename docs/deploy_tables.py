"""Tables of docs/deploy.md and README's section "Deploy": keys of the configuration, instances, costs. `tables` fills them in."""

import typing
from pathlib import Path
from typing import Any

from infra.config import KitConfig
from infra.cost import (
    BALANCER_USD,
    FREE_MB_S,
    HOURS_A_MONTH,
    INTERFACE_ENDPOINT_USD,
    LUSTRE_USD,
    METRIC_USD,
    NAT_USD,
    NUM_DETAILED,
    NUM_METRICS,
    VOLUME_MB_S_USD,
    VOLUME_USD,
    hourly_cost,
)
from infra.sections import Section
from infra.sections_service import ROOT_MB_S, ScheduleConfig
from sizing.instances import INSTANCES

ROOT = Path(__file__).parent.parent


def deploy_keys() -> str:
    """Every key with its default."""
    rows = ["| key | default | what it is |", "|---|---|---|"]
    rows += _rows(KitConfig, "")
    return "\n".join(rows)


def _rows(model: type[Section], prefix: str) -> list[str]:
    plain, nested = [], []
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            default = "required" if field.is_required() else _shown(field.default)
            plain.append(f"| `{prefix}{name}` | {default} | {field.description} |")
            continue
        key = f"{prefix}{name}"
        if field.description:
            plain.append(f"| `{key}` | none | {field.description} |")
        nested += [f"| **[{'[' if inner is ScheduleConfig else ''}{key}{']' if inner is ScheduleConfig else ''}]** | | |"]
        nested += _rows(inner, f"{key}.")
    return plain + nested


def _section_of(annotation: Any) -> type[Section] | None:
    kinds = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (tuple, dict)):
        return "empty"
    return f"`{default}`"


def deploy_instances() -> str:
    """Every instance type that the fleet may have."""
    rows = ["| type | GPUs | GPU memory, GiB | vCPUs | memory, GiB | NVMe, GB | USD an hour |", "|---|---|---|---|---|---|---|"]
    for item in INSTANCES.values():
        price = "not known here" if item.usd_per_hour is None else f"{item.usd_per_hour:.2f}"
        sizes = f"{item.gpu_memory_gib} | {item.vcpus} | {item.memory_gib} | {item.nvme_gb}"
        rows.append(f"| {item.name} | {item.num_gpus} {item.gpu} | {sizes} | {price} |")
    return "\n".join(rows)


def deploy_costs() -> str:
    """What config/dev.toml costs while it stands."""
    config = KitConfig.load("dev", ROOT)
    cost = hourly_cost(config)
    fleet = config.fleet
    least, most = cost.at(fleet.min), cost.at(fleet.max)
    assert least is not None and most is not None, "dev's instance has a price"
    rows = [
        "| what | USD an hour | USD a month |",
        "|---|---|---|",
        _cost_row(f"a {fleet.instance_type}, with its volume of {fleet.root_gib} GiB and its monitoring", cost.instance or 0.0),
        _cost_row("NAT gateway (and 0.045 a GB that passes)", NAT_USD),
        _cost_row("load balancer (and capacity units)", BALANCER_USD),
        _cost_row("metrics of the fleet, while an instance runs", cost.metrics),
        _cost_row(f"**dev as committed, {fleet.min} instance**", least),
        _cost_row(f"dev as committed, {fleet.max} instances: the most that it scales to", most),
    ]
    return "\n".join(rows)


def storage_costs() -> str:
    """The shared file systems side by side."""
    scratch = LUSTRE_USD["SCRATCH_2"]
    assert isinstance(scratch, float)
    rows = [
        "| `storage.kind` | take it when | an adapter put into the bucket | what it costs |",
        "|---|---|---|---|",
        "| `efs` (default) | few instances, models up to about 20 GB, zones to spare | fetched once a fleet, at its first request "
        "| 0.30 a GB and month, 0.03 a GB read |",
        "| `s3files` | many adapters that change often; one copy of everything, in the bucket | is a file on each instance in seconds "
        "| S3, and the fast storage of what was read of late |",
        f"| `fsx` | many instances that start at once with tens of GB each | is a file on every instance | {scratch * 1200:.0f} a month "
        "for the least (1.2 TiB), whether or not it is read; one zone |",
    ]
    return "\n".join(rows)


def standing_costs() -> str:
    """What each choice adds."""
    extra_usd = (ROOT_MB_S - FREE_MB_S) * VOLUME_MB_S_USD
    rows = [
        "| choice | adds |",
        "|---|---|",
        f'| `network.nat = "one"` | {NAT_USD * HOURS_A_MONTH:.0f} USD a month, 0.045 a GB |',
        f"| `network.interface_endpoints` | {INTERFACE_ENDPOINT_USD * HOURS_A_MONTH:.1f} USD a month a service (10) and zone |",
        f"| load balancer | {BALANCER_USD * HOURS_A_MONTH:.0f} USD a month and its capacity units |",
        f"| `fleet.root_gib` | {VOLUME_USD} USD a GB and month, each instance, and {extra_usd:.0f} a month for its {ROOT_MB_S} MB/s |",
        f"| metrics | {NUM_METRICS * METRIC_USD:.0f} USD a month while an instance runs, and {NUM_DETAILED * METRIC_USD:.1f} for each |",
        "| alarms, dashboard, log lines | not in `HourlyCost`: 0.10 a month each, 3 a month, 0.50 a GB |",
        "| PutMetricData's calls | not in `HourlyCost`: 0.01 a thousand, of which an instance makes seven a minute |",
        "| `endpoint.waf` | about 8 USD a month, 0.60 a million requests |",
        "| requests | 3.50 USD a million (REST API), traffic out 0.09 a GB |",
    ]
    return "\n".join(rows)


def _cost_row(what: str, hourly: float) -> str:
    return f"| {what} | {hourly:.2f} | {hourly * HOURS_A_MONTH:.0f} |"


TABLES = {
    "deploy_keys": deploy_keys,
    "deploy_instances": deploy_instances,
    "deploy_costs": deploy_costs,
    "storage_costs": storage_costs,
    "standing_costs": standing_costs,
}

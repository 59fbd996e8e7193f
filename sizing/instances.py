"""The GPU instances that the kit deploys to, read from instances.toml.

Owns the table; does not know the configuration or CDK. The configuration checks against it, outputs and documentation take prices from it.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PRICES_OF: str = _TABLE["prices_of"]  # year-month
PRICE_REGION: str = _TABLE["price_region"]
ARCHITECTURE = "x86_64"  # of every instance in the table; an image must be built for it


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance type. `gpu_memory_gib`: of all its GPUs together. `usd_per_hour`: None where no price is known."""

    name: str
    gpu: str
    num_gpus: int
    gpu_memory_gib: int
    vcpus: int
    memory_gib: int
    nvme_gb: int
    usd_per_hour: float | None = None


INSTANCES = {name: Instance(name=name, **facts) for name, facts in _TABLE["types"].items()}

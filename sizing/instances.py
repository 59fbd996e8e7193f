"""The GPU instances that the kit deploys to, read from instances.toml, with their prices and regions.

Owns the tables' types and the refusals by name; does not know the configuration or CDK. The configuration checks against it, plans, outputs
and documentation take facts and prices from it. `prices.toml` is written anew by infra.prices.
"""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sizing.errors import SizingError

FOLDER = Path(__file__).parent


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))


_TABLE, PRICES, _REGIONS = _table("instances.toml"), _table("prices.toml"), _table("regions.toml")
PRICES_OF: str = PRICES["instances"]["as_of"]  # year-month
PRICE_REGION: str = PRICES["instances"]["region"]
UNCONFIRMED: frozenset[str] = frozenset(PRICES["instances"]["unconfirmed"])
REGIONS_OF: str = _REGIONS["as_of"]
FAMILY_REGIONS: dict[str, frozenset[str]] = {family: frozenset(names) for family, names in _REGIONS["families"].items()}
ARCHITECTURE = "x86_64"  # of every instance in the table; an image must be built for it
# Families of EC2 without a GPU, so that a refusal can say so; anything else is merely not in the table.
_WITHOUT_GPU = ("a1", "c", "d", "h1", "hpc", "i", "im", "is", "m", "mac", "r", "t", "u", "x", "z")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of card. `cuda_mib`: its memory as CUDA says it; `tflops`: dense, bfloat16."""

    name: str
    memory_gb: int
    cuda_mib: int
    bandwidth_gb_s: int
    num_sms: int
    tflops: int

    @property
    def memory_bytes(self) -> int:
        """cuda_mib in bytes."""
        return self.cuda_mib << 20


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
    network_gbit: float
    burst_gbit: float
    usd_per_hour: float | None = None

    @property
    def card(self) -> Gpu:
        """Its GPUs' kind."""
        return GPUS[self.gpu]


GPUS = {name: Gpu(name=name, **facts) for name, facts in _TABLE["gpus"].items()}
_USD: dict[str, float] = PRICES["instances"]["usd_per_hour"]
INSTANCES = {name: Instance(name=name, usd_per_hour=_USD.get(name), **facts) for name, facts in _TABLE["types"].items()}


def instance_named(name: str) -> Instance:
    """The instance type. SizingError says what is wrong with another one: that it has no GPU, or is not in the table."""
    if name in INSTANCES:
        return INSTANCES[name]
    family = name.partition(".")[0]
    letters = family.rstrip("-abcdefghijklmnopqrstuvwxyz").rstrip("0123456789") or family
    allowed = f"Allowed: {', '.join(INSTANCES)}"
    if letters in _WITHOUT_GPU:
        raise SizingError(f"{name} has no GPU: it is no G6, Gr6 or G6e instance. {allowed}")
    near = difflib.get_close_matches(name, INSTANCES, n=1, cutoff=0.8)
    raise SizingError(f"{name} is no G6, Gr6 or G6e instance with a whole GPU{f' (did you mean {near[0]}?)' if near else ''}. {allowed}")


def check_region(instance: Instance, region: str) -> None:
    """SizingError if the region does not have the instance's family, naming those that do and the table's date."""
    family = instance.name.partition(".")[0]
    if region not in FAMILY_REGIONS[family]:
        known = ", ".join(sorted(FAMILY_REGIONS[family]))
        raise SizingError(f"region {region} has no {family} instances by the table of {REGIONS_OF} (sizing/regions.toml). Allowed: {known}")

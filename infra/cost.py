"""What a configuration costs, roughly and before anything is deployed: standing resources and instances, in USD.

Prices are sizing's (sizing/prices.toml; look them up before a decision). Traffic, requests and storage by the gigabyte are not in it:
they are named beside it. Left out, too: alarms (0.10 a month each), the dashboard (3 a month), log lines, the calls of
PutMetricData (0.01 a thousand). Knows no CDK: outputs, the dashboard and the documentation call it.
"""

from dataclasses import dataclass

from infra.config import KitConfig
from infra.sections_service import ROOT_MB_S
from sizing.instances import PRICE_REGION, PRICES, PRICES_OF

HOURS_A_MONTH = 730
NAT_USD: float = PRICES["standing"]["nat_usd"]  # an hour; and 0.045 a GB that passes
BALANCER_USD: float = PRICES["standing"]["balancer_usd"]  # an hour; and capacity units
INTERFACE_ENDPOINT_USD: float = PRICES["standing"]["interface_endpoint_usd"]  # an hour, service and zone
VOLUME_USD: float = PRICES["monthly"]["volume_usd"]  # a GB and month, gp3, with 125 MB/s and 3000 IOPS, of which we ask for no more
VOLUME_MB_S_USD: float = PRICES["monthly"]["volume_mb_s_usd"]  # a MB/s and month above these
METRIC_USD: float = PRICES["monthly"]["metric_usd"]  # a month and metric, by the hours in which it is published
LUSTRE_USD = {  # a GB and month
    "SCRATCH_2": PRICES["monthly"]["lustre_scratch_usd"],
    "PERSISTENT_2": {int(speed): usd for speed, usd in PRICES["monthly"]["lustre_persistent_usd"].items()},
}
WAF_USD: float = PRICES["monthly"]["waf_usd"]  # a month: one list, its rules
NUM_ENDPOINTS = 10  # of `network`: services that instances call
NUM_METRICS = 30  # of the group, however many publish: the server's 8, the boot's 6, the CloudWatch agent's 16 with one GPU and two disks
NUM_DETAILED = 7  # of each instance: EC2's detailed monitoring
FREE_MB_S = 125


@dataclass(frozen=True)
class Cost:
    """USD an hour: `standing` without any instance, `instance` for each (None where its price is not known), `metrics` if there is any."""

    standing: float
    instance: float | None
    metrics: float

    def at(self, num_instances: int) -> float | None:
        """An hour with so many instances."""
        if self.instance is None:
            return None
        return self.standing + (self.metrics if num_instances else 0.0) + num_instances * self.instance


def hourly_cost(config: KitConfig) -> Cost:
    """What runs whether or not anybody calls."""
    network, storage = config.network, config.storage
    standing = BALANCER_USD
    if network.has_nat and network.vpc_id is None:
        standing += NAT_USD
    if network.endpoints:
        standing += NUM_ENDPOINTS * network.max_azs * INTERFACE_ENDPOINT_USD
    if storage.kind == "fsx":
        price = LUSTRE_USD[storage.fsx.deployment]
        standing += storage.fsx.capacity_gib * (price if isinstance(price, float) else price[storage.fsx.throughput]) / HOURS_A_MONTH
    if config.endpoint.waf:
        standing += WAF_USD / HOURS_A_MONTH
    price = config.fleet.instance.usd_per_hour
    beside = config.fleet.root_gib * VOLUME_USD + (ROOT_MB_S - FREE_MB_S) * VOLUME_MB_S_USD + NUM_DETAILED * METRIC_USD  # a month
    instance = None if price is None else round(price + beside / HOURS_A_MONTH, 4)
    return Cost(round(standing, 4), instance, round(NUM_METRICS * METRIC_USD / HOURS_A_MONTH, 4))


def cost_text(config: KitConfig) -> str:
    """One line for the deploy's output."""
    cost, fleet = hourly_cost(config), config.fleet
    where = f"on demand, {PRICE_REGION} prices of {PRICES_OF}; requests, traffic and stored GB come on top"
    if cost.instance is None:
        return f"{cost.standing:.2f} USD an hour without instances; the price of {fleet.instance_type} is not known here ({where})"
    span = f"{cost.at(fleet.min):.2f}" if fleet.min == fleet.max else f"{cost.at(fleet.min):.2f} to {cost.at(fleet.max):.2f}"
    numbers = f"{fleet.min}" if fleet.min == fleet.max else f"{fleet.min} to {fleet.max}"
    return f"{span} USD an hour with {numbers} {fleet.instance_type}, {cost.standing:.2f} of it without any ({where})"

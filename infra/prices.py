"""Looks the instances' prices up through AWS's Pricing API and writes them to sizing/prices.toml: `python -m infra.plan --refresh`.

Owns the question and the reading of its answers (GetProducts, https://docs.aws.amazon.com/aws-cost-management/latest/APIReference/). The
other prices of the file stay as they are. Credentials are boto3's own business; the right wanted is pricing:GetProducts.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.regions import REGIONS
from sizing.instances import FOLDER, INSTANCES, PRICE_REGION, PRICES

PATH = FOLDER / "prices.toml"
_API_REGION = "us-east-1"  # one of the few that have it; it answers for all
_END = "# What stands beside the instances"  # where the part of the file that is kept begins
_WANTED = {"operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA", "capacitystatus": "Used"}


def refresh(region: str | None = None, *, path: Path = PATH, client: Any = None) -> list[str]:
    """Write the prices of `region` (none: the one that the file has), and say what changed. ConfigError, and the file as it was, if the API
    cannot be asked or has no price of some instance type at all. A type that the region does not sell has no price afterwards."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = region or PRICE_REGION
    if region not in REGIONS:
        raise ConfigError(f"--region {region}: there is no such region. Allowed: {', '.join(sorted(REGIONS))}")
    try:
        client = client or boto3.client("pricing", region_name=_API_REGION)
        found = {name: price_of(client, name, region) for name in INSTANCES}
    except (BotoCoreError, ClientError) as error:
        raise ConfigError(f"--refresh: the Pricing API could not be asked, which needs pricing:GetProducts: {error}") from None
    prices = {name: usd for name, usd in found.items() if usd is not None}
    if not prices:
        raise ConfigError(f"--refresh: the Pricing API has no price of any G6, Gr6 or G6e instance in {region}; nothing was written")
    _write(path, region, prices)
    return [*_changes(prices), f"wrote {path.name}: {len(prices)} prices of {region}"]


def price_of(client: Any, instance_type: str, region: str) -> float | None:
    """USD an hour of Linux on demand; None if the region does not sell the type. ConfigError if there is more than one price."""
    filters = {"instanceType": instance_type, "regionCode": region} | _WANTED
    pages = client.get_paginator("get_products").paginate(
        ServiceCode="AmazonEC2",
        FormatVersion="aws_v1",
        Filters=[{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in filters.items()],
    )
    prices = {usd for page in pages for product in page["PriceList"] for usd in _hourly(json.loads(product))}
    if len(prices) > 1:
        raise ConfigError(f"--refresh: the Pricing API has {len(prices)} prices of {instance_type} in {region}; nothing was written")
    return prices.pop() if prices else None


def _hourly(product: dict[str, Any]) -> Iterator[float]:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            usd = float(dimension["pricePerUnit"].get("USD", 0))
            if dimension["unit"] == "Hrs" and usd > 0:  # reservations are listed too, at nought
                yield usd


def _write(path: Path, region: str, prices: dict[str, float]) -> None:
    """The file with a new first part, whole or not at all."""
    head, marker, kept = path.read_text(encoding="utf-8").partition(_END)
    comment = head.partition("\n[instances]\n")[0]
    lines = [
        "[instances]",
        f'region = "{region}"',
        f'as_of = "{datetime.now(UTC).date().isoformat()}"',
        'source = "AWS Pricing API"',
        "unconfirmed = []",
        "",
        "[instances.usd_per_hour]",
        *(f'"{name}" = {usd:.10g}' for name, usd in prices.items()),
    ]
    fresh = path.with_suffix(".part")
    fresh.write_text(comment + "\n" + "\n".join(lines) + "\n\n" + marker + kept, encoding="utf-8")
    fresh.replace(path)


def _changes(prices: dict[str, float]) -> Iterator[str]:
    before: dict[str, float] = PRICES["instances"]["usd_per_hour"]
    for name in INSTANCES:
        old, new = before.get(name), prices.get(name)
        if old != new:
            yield f"{name}: {'no price' if old is None else old} -> {'no price' if new is None else new}"

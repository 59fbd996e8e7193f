"""The tables of instances, prices and regions against EC2's own answers, as moto carries them."""

import gzip
import json
from pathlib import Path

import moto
import pytest

from infra.regions import REGIONS
from sizing.errors import SizingError
from sizing.instances import FAMILY_REGIONS, GPUS, INSTANCES, PRICES, UNCONFIRMED, check_region, instance_named

EC2 = Path(moto.__file__).parent / "ec2" / "resources"


def test_facts_are_those_of_ec2():
    said = json.loads(gzip.decompress((EC2 / "instance_types.json.gz").read_bytes()))
    assert {name for name in said if name.partition(".")[0] in FAMILY_REGIONS} == set(INSTANCES)
    for name, mine in INSTANCES.items():
        facts = said[name]
        (gpu,) = facts["GpuInfo"]["Gpus"]
        network = facts["NetworkInfo"]
        assert (mine.gpu, mine.num_gpus) == (gpu["Name"], gpu["Count"])
        assert mine.gpu_memory_gib == facts["GpuInfo"]["TotalGpuMemoryInMiB"] // 1024
        assert (mine.vcpus, mine.memory_gib) == (facts["VCpuInfo"]["DefaultVCpus"], facts["MemoryInfo"]["SizeInMiB"] // 1024)
        assert mine.nvme_gb == facts["InstanceStorageInfo"]["TotalSizeInGB"]
        assert mine.network_gbit == network["NetworkCards"][0]["BaselineBandwidthInGbps"]
        assert network["NetworkPerformance"].removeprefix("Up to ") == f"{mine.burst_gbit:g} Gigabit"


def test_cuda_sees_a_little_less_than_ec2_says():
    for instance in INSTANCES.values():
        assert 0.97 < instance.card.cuda_mib / 1024 / (instance.gpu_memory_gib / instance.num_gpus) < 1.01


def test_regions_are_those_of_ec2():
    for path in (EC2 / "instance_type_offerings" / "region").glob("*.json.gz"):
        region = path.name.partition(".")[0]
        offered = {entry["InstanceType"].partition(".")[0] for entry in json.loads(gzip.decompress(path.read_bytes()))}
        for family, regions in FAMILY_REGIONS.items():
            assert (region in regions) == (family in offered), f"{family} in {region}"
    assert set().union(*FAMILY_REGIONS.values()) <= REGIONS


def test_every_instance_has_a_price_and_a_card():
    assert set(PRICES["instances"]["usd_per_hour"]) == set(INSTANCES) >= UNCONFIRMED
    assert {instance.gpu for instance in INSTANCES.values()} < set(GPUS)
    for instance in INSTANCES.values():
        assert 0.2 < instance.usd_per_hour / instance.num_gpus < 10


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m7i.xlarge", "m7i.xlarge has no GPU: it is no G6, Gr6 or G6e instance. Allowed: g6.xlarge, "),
        ("t3.medium", "t3.medium has no GPU"),
        ("c7gn.16xlarge", "c7gn.16xlarge has no GPU"),
        ("g6.3xlarge", "g6.3xlarge is no G6, Gr6 or G6e instance with a whole GPU (did you mean g6.xlarge?)"),
        ("g6f.xlarge", "g6f.xlarge is no G6, Gr6 or G6e instance with a whole GPU (did you mean"),
        ("p5.48xlarge", "p5.48xlarge is no G6, Gr6 or G6e instance"),
        ("", " is no G6, Gr6 or G6e instance"),
    ],
)
def test_another_instance_is_refused_by_name(name, said):
    with pytest.raises(SizingError) as caught:
        instance_named(name)
    assert said in str(caught.value)


def test_a_region_without_the_family_is_refused_by_name():
    check_region(INSTANCES["g6.xlarge"], "eu-west-2")
    with pytest.raises(SizingError, match=r"region eu-west-1 has no g6 instances by the table of 2026-11 .*Allowed: ap-northeast-1, "):
        check_region(INSTANCES["g6.xlarge"], "eu-west-1")
    with pytest.raises(SizingError, match="region eu-west-2 has no g6e instances"):
        check_region(INSTANCES["g6e.xlarge"], "eu-west-2")

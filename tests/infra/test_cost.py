"""The cost that is said before and after a deploy."""

import dataclasses
import json
import tomllib

import pytest

from infra.boot_phases import TABLE
from infra.config import KitConfig
from infra.cost import HOURS_A_MONTH, NUM_METRICS, cost_text, hourly_cost
from infra.sections_service import ROOT_MB_S
from server.host import load
from sizing.instances import INSTANCES
from tests.infra.conftest import ROOT, resources


def cost_of(**overrides):
    return hourly_cost(KitConfig.load("dev", ROOT, {key.replace("__", "."): value for key, value in overrides.items()}))


def test_an_instance_is_most_of_it_and_nothing_is_free_of_it():
    cost = cost_of()
    assert 0.80 < cost.instance < 0.83 and 0.06 < cost.standing < 0.08
    assert cost.at(0) == cost.standing and cost.at(2) == pytest.approx(cost.standing + cost.metrics + 2 * cost.instance)


def test_a_disks_throughput_and_the_metrics_are_in_it():
    """(250 - 125) MB/s at 0.04, seven metrics of detailed monitoring and thirty of the group at 0.30 a month."""
    cost, instance = cost_of(), KitConfig.load("dev", ROOT).fleet.instance
    beside = 128 * 0.08 + 5.0 + 2.1
    assert cost.instance == pytest.approx(instance.usd_per_hour + beside / HOURS_A_MONTH, abs=1e-4)
    assert cost.metrics == pytest.approx(9.0 / HOURS_A_MONTH, abs=1e-4)


def test_the_metrics_are_those_that_are_published():
    collected = json.loads((ROOT / "ami" / "cloudwatch-agent.json").read_text())["metrics"]["metrics_collected"]
    disks, gpu = collected["disk"], len(collected["nvidia_gpu"]["measurement"])
    # Each disk and each GPU under its own name, and all of them once more under the group's.
    host = len(collected["mem"]["measurement"]) + len(disks["measurement"]) * (len(disks["resources"]) + 1) + 2 * gpu
    boot = len(tomllib.loads(TABLE.read_text())["seconds"]) - 1  # launch is not timed
    assert len(load.PUBLISHED) + len(load.RATES) + boot + host == NUM_METRICS


def test_the_disk_is_the_one_that_is_paid(synth):
    (template,) = resources(synth()["service"], "AWS::EC2::LaunchTemplate").values()
    data = template["Properties"]["LaunchTemplateData"]
    ebs = data["BlockDeviceMappings"][0]["Ebs"]
    assert ebs["Throughput"] == ROOT_MB_S and "Iops" not in ebs and data["Monitoring"]["Enabled"] is True


@pytest.mark.parametrize(
    ("overrides", "dearer"),
    [
        ({"network__public_fleet": True}, False),
        ({"network__interface_endpoints": True}, True),
        ({"storage__kind": "fsx"}, True),
        ({"endpoint__waf": True}, True),
    ],
)
def test_each_choice_counts(overrides, dearer):
    assert (cost_of(**overrides).standing > cost_of().standing) == dearer


def test_the_output_says_what_is_known_and_what_is_not(monkeypatch):
    assert cost_text(KitConfig.load("dev", ROOT)).startswith("0.91 to 1.74 USD an hour with 1 to 2 g6.xlarge, 0.07 of it without any")
    config = KitConfig.load("dev", ROOT)
    monkeypatch.setitem(INSTANCES, "g6.xlarge", dataclasses.replace(config.fleet.instance, usd_per_hour=None))
    assert "the price of g6.xlarge is not known here" in cost_text(config)

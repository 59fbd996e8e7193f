"""The cost that is said before and after a deploy."""

import dataclasses

import pytest

from infra.config import KitConfig
from infra.cost import cost_text, hourly_cost
from sizing.instances import INSTANCES
from tests.infra.conftest import ROOT


def cost_of(**overrides):
    return hourly_cost(KitConfig.load("dev", ROOT, {key.replace("__", "."): value for key, value in overrides.items()}))


def test_an_instance_is_most_of_it_and_nothing_is_free_of_it():
    cost = cost_of()
    assert 0.80 < cost.instance < 0.83 and 0.06 < cost.standing < 0.08
    assert cost.at(0) == cost.standing and cost.at(2) == pytest.approx(cost.standing + 2 * cost.instance)


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
    assert cost_text(KitConfig.load("dev", ROOT)).startswith("0.89 to 1.71 USD an hour with 1 to 2 g6.xlarge, 0.07 of it without any")
    config = KitConfig.load("dev", ROOT)
    monkeypatch.setitem(INSTANCES, "g6.xlarge", dataclasses.replace(config.fleet.instance, usd_per_hour=None))
    assert "the price of g6.xlarge is not known here" in cost_text(config)

"""The scaling simulation: its parts do what they are said to, and the numbers of the policy are those of the deployment."""

import pytest

from benchmarks.scaling import (
    MOST_LOAD,
    PERIOD_S,
    SIGNALS,
    Instance,
    Machine,
    Outcome,
    Request,
    TargetTracking,
    best,
    simulate,
    traffic,
    ways,
)
from infra import scaling
from infra.boot_phases import grace_s
from infra.config import KitConfig
from server.metrics import load_ratio
from tests.infra.edge_stack import ROOT

HOUR_S = 3600
LOAD = SIGNALS[0]


def steady(rate: float, duration_s: int, *, output_len: int = 130) -> list[Request]:
    return [Request(i / rate, 300, output_len) for i in range(int(rate * duration_s))]


def test_the_policy_is_the_deployments():
    assert (PERIOD_S, MOST_LOAD) == (scaling.PERIOD_S, scaling.MOST_LOAD) == (LOAD.period_s, LOAD.most)


def test_the_boot_is_that_of_the_deployment():
    """The grace period is the phases with a margin."""
    assert 0 < ways()["baked image"] < ways()["plain image"] < grace_s(KitConfig.load("dev", ROOT))


def test_a_day_is_the_same_day_again():
    assert list(traffic(3, duration_s=600)) == list(traffic(3, duration_s=600)) != list(traffic(4, duration_s=600))
    times = [request.at for request in traffic(3, duration_s=600)]
    assert times == sorted(times) and times[-1] < 600


def test_an_instance_serves_every_request_with_its_work():
    machine = Machine()
    instance, waits = Instance(machine, 0.0), []
    for _ in range(100):
        instance.add(Request(0.0, 100, 50))
    seconds = 0
    while instance.num_open:
        seconds += 1
        waits += instance.run(seconds)
    assert len(waits) == 100 and instance.load_ratio() == pytest.approx(0)
    work = 50 + 100 * machine.prompt_weight
    alone = work * (machine.step_s + machine.step_per_sequence_s * machine.max_batch)
    assert alone < seconds < 3 * alone + 3  # two batches, the second one smaller
    assert sum(wait > 1 for wait in waits) == 100 - machine.max_batch


def test_the_instances_load_is_the_servers_formula():
    machine = Machine()
    instance = Instance(machine, 0.0)
    for _ in range(80):
        instance.add(Request(0.0, 300, 500))
    instance.run(1)
    tokens = 80 * 300
    stats = {
        "num_tokens": tokens,
        "max_tokens": machine.max_tokens,
        "num_running": instance.num_running,
        "max_batch_size": machine.max_batch,
    }
    assert instance.load_ratio() == pytest.approx(load_ratio(stats | {"num_waiting": len(instance.queue)}))


def test_tracking_adds_after_three_periods_and_takes_away_after_fifteen_minutes():
    policy = TargetTracking(0.7, 60, min_size=1, max_size=10)
    assert [policy.decide(1.4, 2, 2) for _ in range(3)] == [2, 2, 4]
    assert policy.decide(1.4, 2, 4) == 4  # those that boot count as capacity
    quiet = [policy.decide(0.35, 4, 4) for _ in range(15)]
    assert quiet == [4] * 14 + [2]
    assert policy.decide(9.0, 2, 2) == policy.decide(9.0, 2, 2) == 2 and policy.decide(9.0, 2, 2) == 10


def test_a_fleet_grows_with_its_load_and_waits_end():
    machine = Machine(boot_s=60)
    calm = simulate(LOAD, 0.7, steady(0.5, HOUR_S), machine)
    assert calm.most_instances == 1 and calm.p95_wait_s <= 1.0 and calm.num_requests == 1800
    busy = simulate(LOAD, 0.7, steady(12, HOUR_S), machine)
    assert busy.most_instances >= 3 and busy.p50_wait_s < 5 and busy.num_requests == 12 * HOUR_S
    assert busy.instance_hours > 2 * calm.instance_hours


def test_instances_that_boot_faster_make_waits_shorter():
    requests = steady(1, 1200) + [Request(1200 + i / 12, 300, 130) for i in range(12 * 1200)]
    slow, fast = (simulate(LOAD, 0.7, requests, Machine(boot_s=boot_s)) for boot_s in (600, 30))
    assert fast.p95_wait_s < slow.p95_wait_s / 2


def test_the_cheapest_that_keeps_the_wait_is_chosen():
    def outcome(wait: float, hours: float) -> Outcome:
        return Outcome("x", 1.0, 0.0, wait, wait, hours, 1, 1)

    assert best([outcome(1, 9), outcome(4, 7), outcome(50, 2)]).instance_hours == 7
    assert best([outcome(60, 9), outcome(50, 2)]).p95_wait_s == 50

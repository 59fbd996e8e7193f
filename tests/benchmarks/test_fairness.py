"""The fairness simulation: its figures are what they are called, the orders do what they are said to, nothing is lost in it."""

import itertools
import statistics
from dataclasses import replace

import pytest

from benchmarks.fairness import TRAFFIC, Machine, Traffic, arrivals, describe, fair_shares, jain, play
from benchmarks.fairness_orders import ORDERS
from tests.server.engine.worlds import World

MACHINE = Machine(max_batch_size=8, num_blocks=800)
SHORT = Traffic("short", 1.3, num_tenants=4, num_adapters=16, room=6, duration_s=8.0, mean_prompt_len=20, mean_output_len=12)


def played(traffic, order):
    requests = list(arrivals(traffic, MACHINE, 0))
    run = play(requests, ORDERS[order](), MACHINE, traffic.room)
    assert set(run.first_token_at) == set(range(len(requests)))
    return describe(requests, run, traffic)


def test_jains_index_and_max_min_shares():
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0) and jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert fair_shares([1.0, 10.0, 4.0], 9.0) == [1.0, 4.0, 4.0]
    assert fair_shares([2.0, 9.0, 9.0], 9.0) == [2.0, 3.5, 3.5]


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_arrivals_have_their_rate_and_their_spread(cv):
    traffic = replace(SHORT, cv=cv, duration_s=150.0)
    requests = list(arrivals(traffic, MACHINE, 1))
    gaps = [after.at - before.at for before, after in zip(requests, requests[1:], strict=False)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.15)
    step_s = MACHINE.step_s + 8 * MACHINE.row_s + 6 * MACHINE.adapter_s
    work_s = sum(MACHINE.prompt_token_s * one.prompt_len + step_s * one.output_len / 8 for one in requests)
    assert work_s / 150.0 == pytest.approx(1.3, rel=0.1)
    assert requests == list(arrivals(traffic, MACHINE, 1)) != list(arrivals(traffic, MACHINE, 2))


def test_a_noisy_tenant_asks_for_ten_times_as_much():
    counts = [0] * 4
    for one in arrivals(replace(SHORT, noisy=10.0, duration_s=40.0), MACHINE, 0):
        counts[one.tenant] += 1
        assert one.adapter % 4 == one.tenant
    assert counts[0] / statistics.fmean(counts[1:]) == pytest.approx(10.0, rel=0.2)


def test_here_a_noisy_tenant_waits_for_itself():
    noisy = replace(SHORT, noisy=10.0)
    here, arrival = played(noisy, "here"), played(noisy, "order of arrival")
    assert here["jain"] > 0.99 > arrival["jain"]
    assert here["quiet_p99_s"] < arrival["quiet_p99_s"] / 2


@pytest.mark.parametrize("order", ORDERS)
def test_a_cold_adapter_against_hot_ones_that_never_pause(order):
    """By vLLM's rule it never starts; in order of arrival nobody behind it does, until the hot ones have ended."""
    world, lengths = World(device_bytes=20, max_batch_size=8, num_blocks=400, queue=ORDERS[order]()), itertools.cycle(range(11, 51, 3))
    for adapter in "ab" * 20:
        world.add("t", adapter, max_new=next(lengths))
    world.step()
    cold = world.add("t", "cold")
    while world.clock.now < 1008 and cold not in world.step():
        for adapter in "ab":
            world.add("t", adapter, max_new=next(lengths))
    behind = {sequence.order for sequence in world.started} - {*range(41)}
    assert (cold in world.scheduler.sequences and not world.scheduler.sequences[cold].blocks) == (order == "vLLM's rule")
    assert bool(behind) == (order != "order of arrival")


def test_a_machine_that_is_not_full_serves_all_orders_alike():
    easy = replace(SHORT, load=0.3, room=16)
    figures = [played(easy, order) for order in ORDERS]
    assert all(one["longest_wait_s"] < 0.5 and one["jain"] > 0.99 for one in figures)


def test_the_traffic_is_what_was_promised():
    assert {one.cv for one in TRAFFIC} == {1.0, 4.0} and max(one.noisy for one in TRAFFIC) == 10.0

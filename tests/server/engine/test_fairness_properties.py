"""Fairness whatever comes and goes: what holds after every step of drawn requests, removals and time."""

import itertools
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.engine.worlds import World, names


class Sequences:
    """What hypothesis draws: requests, removals and time."""

    request = st.tuples(
        st.just("add"),
        st.sampled_from("pqr"),
        st.sampled_from([None, "a", "b", "c", "d", "e"]),
        st.integers(1, 20),
        st.integers(1, 12),
        st.sampled_from([0.5, 1.0, 2.0]),
    )
    actions = st.lists(st.one_of(request, st.tuples(st.just("step"), st.integers(1, 6)), st.tuples(st.just("remove"), st.integers(0, 99))))


def check(world):
    """What holds after every step."""
    scheduler, queue = world.scheduler, world.scheduler.queue
    held = sum(len(sequence.blocks) for sequence in scheduler.running)
    assert world.pool.num_used <= held <= world.pool.num_used + 8 * len(scheduler.running)
    running = {s.adapter_hash for s in scheduler.running} - {""}
    assert set(scheduler._pins.running) == running
    assert sum(world.tiers._entries[a].num_pins for a in running) == sum(bool(s.adapter_hash) for s in scheduler.running)
    queued = [s for s in scheduler.sequences.values() if s not in scheduler.running]
    parked = {s for sequences in scheduler._parked.values() for s in sequences}
    assert {s for s in queued if s.is_queued} == set(queued) - parked
    assert queue.num_queued == len(queued) - len(parked)
    assert set(queue._refused_at) <= {s.adapter_hash for s in queued}


@settings(max_examples=150, deadline=None)
@given(Sequences.actions, st.integers(6, 40), st.integers(10, 50), st.sampled_from([None, 2]))
def test_nothing_is_lost_whatever_comes_and_goes(actions, num_blocks, device_bytes, max_batch_adapters):
    world = World(num_blocks, device_bytes=device_bytes, max_batch_size=4, max_batch_tokens=8, max_batch_adapters=max_batch_adapters)
    added, removed = set(), set()
    for action, *values in actions:
        if action == "add":
            tenant, adapter, prompt_len, max_new, weight = values
            if prompt_len + max_new <= world.scheduler.max_sequence_len:
                added.add(world.add(tenant, adapter, prompt_len, max_new, weight=weight))
        elif action == "remove":
            alive = sorted(world.scheduler.sequences)
            if alive:
                removed.add(alive[values[0] % len(alive)])
                world.scheduler.remove(alive[values[0] % len(alive)])
        else:
            for _ in range(values[0]):
                world.step()
                check(world)
    world.step_s = 1.0  # so that waiting for room is over soon
    while world.scheduler.sequences:
        world.step()
        check(world)
        assert world.clock.now < 10_000
    assert set(names(world.finished)) == added - removed and len(world.finished) == len(added - removed)
    assert world.pool.num_used == 0 and not world.scheduler.has_work and world.tiers.device.used_bytes <= device_bytes
    assert not world.scheduler.queue._held and not world.scheduler.queue._refused_at


@settings(max_examples=100, deadline=None)
@given(Sequences.actions, st.integers(12, 40))
def test_no_place_stays_empty_while_somebody_could_take_it(actions, num_blocks):
    """With room for all adapters: a step that leaves rows and tokens free leaves nobody waiting but for blocks."""
    world = World(num_blocks, device_bytes=1000, max_batch_size=4, max_batch_tokens=8, prefix_caching=False)
    for action, *values in actions:
        if action == "add" and sum(values[2:4]) <= world.scheduler.max_sequence_len:
            world.add(*values[:4], weight=values[4])
        elif action == "step":
            for _ in range(values[0]):
                preemptions = world.scheduler.num_preemptions
                chunks = world.step()
                waiting = [s for s in world.scheduler.sequences.values() if s.is_queued]
                if not waiting or world.scheduler.num_preemptions > preemptions:
                    continue
                has_rows = len(chunks) < 4 and sum(chunks.values()) < 8
                assert not has_rows or world.pool.num_free <= 5 + 4 + 4  # a first chunk's, one a row, and those that ended in the step


backlog = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from([None, "a", "b"])), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(backlog, backlog, st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 6), st.integers(20, 60))
def test_two_tenants_that_always_wait_differ_by_two_batches_at_most(one, other, weight, max_batch_size, num_blocks):
    """Theorem 4.4 of the paper: |service of one / weight - the other's| <= 2 U. U: a prompt, or all outputs of a batch."""
    world = World(num_blocks, max_batch_size=max_batch_size, max_batch_tokens=32, device_bytes=1000, prefix_caching=False)
    shapes = {"one": itertools.cycle(one), "other": itertools.cycle(other)}
    weights = {"one": 1.0, "other": weight}
    waiting = dict.fromkeys(shapes, 0)
    most = 20 + 2 * max_batch_size * 12
    for _ in range(250):
        for tenant, shape in shapes.items():
            waiting[tenant] = sum(s.request.tenant == tenant and s.is_queued for s in world.scheduler.sequences.values())
            for _ in range(max(0, 8 - waiting[tenant])):
                prompt_len, max_new, adapter = next(shape)
                world.add(tenant, adapter, prompt_len, max_new, weight=weights[tenant])
        world.step()
        share = {tenant: world.service.get(tenant, 0.0) / weights[tenant] for tenant in shapes}
        assert abs(share["one"] - share["other"]) <= 2 * most / min(weights.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from([None, *"abcdefgh"]), st.integers(1, 30)), min_size=1, max_size=30))
def test_nobody_starves(requests):
    """However fast others come: everybody who is there starts in a time that depends on who is there, not on who comes."""
    world, count = World(device_bytes=30, max_batch_size=4, num_blocks=200, step_s=0.1), itertools.count()
    ours = [world.add(tenant, adapter, prompt_len, 3) for tenant, adapter, prompt_len in requests]
    deadline = time.monotonic() + 60
    for _ in range(3000):
        for tenant in ("p", "q", "flood"):
            if world.scheduler.num_waiting < 200:
                world.add(tenant, f"f{next(count) % 20}", max_new=10)
        world.step()
        if set(ours) <= set(names(world.started)):
            return
        assert time.monotonic() < deadline
    raise AssertionError(set(ours) - set(names(world.started)))

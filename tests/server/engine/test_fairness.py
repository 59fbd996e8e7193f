"""Fairness over tenants and adapters: whose turn it is, what joining and leaving does to it, how long a cold adapter waits."""

import itertools

import pytest

from server.engine.fairness import FairQueue
from tests.server.engine.worlds import World, names


def test_one_tenant_with_one_adapter_is_served_in_order_of_arrival():
    for adapter in (None, "x"):
        world = World(max_batch_size=2, max_batch_tokens=8)
        for index in range(20):
            world.add("t", adapter, prompt_len=1 + index % 7, max_new=1 + index % 5, name=str(index))
        world.run()
        assert names(world.started) == [str(index) for index in range(20)]


def test_a_quiet_tenant_does_not_wait_behind_a_noisy_one():
    world = World(max_batch_size=4)
    for _ in range(200):
        world.add("noisy")
    for _ in range(10):
        world.step()
    world.add("quiet", name="quiet")
    started_before = len(world.started)
    while "quiet" not in names(world.started):
        world.step()
    assert len(world.started) - started_before <= 4  # it starts in the first step that has a free place


def test_tenants_that_always_wait_are_given_the_same_whatever_their_requests_look_like():
    world = World(max_batch_size=6, num_blocks=200)
    for _ in range(400):
        world.add("long", prompt_len=40, max_new=2)
        world.add("short", prompt_len=2, max_new=3)
        world.add("talkative", prompt_len=2, max_new=30)
    for _ in range(380):
        world.step()
    given_to = world.service
    largest = 40 + 2 * 6 * 30  # the paper's U: a prompt, or the outputs of a batch
    assert max(given_to.values()) - min(given_to.values()) <= 2 * largest
    assert min(given_to.values()) > 4 * largest  # so that the bound says something


def test_weights_are_shares():
    world = World(max_batch_size=4)
    for _ in range(1500):
        world.add("one", weight=1.0)
        world.add("three", weight=3.0)
    for _ in range(1000):
        world.step()
    assert world.service["three"] / world.service["one"] == pytest.approx(3.0, rel=0.05)
    with pytest.raises(ValueError, match=r"a weight is between 0\.001 and 1000\.0\. Given: 0"):
        world.add("none", weight=0.0)
    with pytest.raises(ValueError, match="weight"):
        world.add("none", weight=float("nan"))


def test_staying_away_banks_no_credit():
    world = World(max_batch_size=1)
    for _ in range(300):
        world.add("steady")
    world.add("away")
    for _ in range(200):
        world.step()
    for _ in range(20):
        world.add("away")
    before = len(world.started)
    for _ in range(60):
        world.step()
    turns = [sequence.request.tenant for sequence in world.started[before:]]
    assert abs(turns.count("away") - turns.count("steady")) <= 2


def test_going_away_for_a_moment_wipes_out_no_debt():
    """Who was given much and comes back at once is still behind those who wait."""
    world = World(max_batch_size=1, max_batch_tokens=400, num_blocks=200)
    world.add("greedy", prompt_len=300, max_new=1)
    for _ in range(10):
        world.add("other")
    world.step()
    world.add("greedy", name="again")
    world.run()
    assert names(world.started).index("again") == 11


def test_adapters_of_a_tenant_take_turns_and_so_does_the_base():
    world = World(max_batch_size=1)
    for _ in range(10):
        world.add("t", "a")
    for _ in range(3):
        world.add("t", "b")
        world.add("t", None)
    world.run()
    assert [s.adapter_hash for s in world.started][:9] == ["a", "b", "", "a", "b", "", "a", "b", ""]


def test_adapters_do_not_multiply_a_tenants_share():
    world = World(max_batch_size=1, device_bytes=10**6)
    for index in range(100):
        world.add("many", f"a{index}")
        world.add("one", "b")
    for _ in range(200):
        world.step()
    turns = [sequence.request.tenant for sequence in world.started]
    assert abs(turns.count("many") - turns.count("one")) <= 1


def test_cached_prompt_tokens_are_free_and_so_is_computing_again():
    world = World(max_batch_size=3, num_blocks=6)
    for _ in range(3):
        world.add("t", prompt_len=4, max_new=12)
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert world.service == {"t": 3 * (4 + 2 * 12)} == {"t": tokens(world, "t")}
    cached = World()
    for name in ("first", "second"):
        cached.scheduler.add(request_of(cached, name))
        cached.run()
    assert cached.finished[1].num_cached == 8
    assert tokens(cached, "first") == 9 + 2 and tokens(cached, "second") - tokens(cached, "first") == 1 + 2


def tokens(world, tenant):
    return world.scheduler.queue._tenants[tenant].counters[0]


def request_of(world, tenant):
    from server.types import EngineRequest, SamplingParams

    return EngineRequest(tenant, list(range(9)), SamplingParams(max_new_tokens=1), tenant=tenant)


def test_a_cold_adapter_waits_for_a_bounded_time_against_hot_ones_that_never_stop():
    """It runs MAX_OVERTAKEN_S and the longest answer that runs after its turn, at the latest."""
    world, longest, lengths = World(device_bytes=40, max_batch_size=16, num_blocks=400), 50, itertools.cycle(range(11, 51, 3))

    def add_hot(num):
        for adapter in "abcd" * num:
            world.add("t", adapter, max_new=next(lengths))

    add_hot(20)
    world.step()
    cold, asked_at = world.add("t", "cold"), world.clock.now
    while cold not in world.step():
        add_hot(1)
        assert world.clock.now - asked_at < FairQueue.MAX_OVERTAKEN_S + (longest + 3) * world.step_s
    assert world.clock.now - asked_at > FairQueue.MAX_OVERTAKEN_S  # it was passed before, so that the bound is what let it in
    world.run()
    assert not world.scheduler.queue._held and not world.scheduler.queue._refused_at


def test_while_one_adapter_is_made_to_leave_the_others_go_on():
    world, lengths = World(device_bytes=80, max_batch_size=32, num_blocks=1000), itertools.cycle(range(11, 51, 3))
    for adapter in "abcdefgh" * 150:
        world.add("t", adapter, max_new=next(lengths))
    for _ in range(5):
        world.step()
    cold, others = world.add("t", "cold", max_new=1), set("abcdefgh")
    while cold not in (chunks := world.step()):
        assert len(chunks) == 32  # no row stays empty
        if world.scheduler.queue._held:
            others -= world.scheduler.queue._held
            assert len(others) >= 6  # a quarter at most starts nothing more
    assert len(others) < 8 and world.clock.now > 1000 + FairQueue.MAX_OVERTAKEN_S
    world.run()


def test_a_tenants_cold_adapter_gets_room_though_its_hot_one_takes_all_tokens_it_is_due():
    """The others' cold adapters never stop coming; by tokens alone they would always be first."""
    world, count = World(device_bytes=30, max_batch_size=8, num_blocks=400), itertools.count()
    for _ in range(300):
        world.add("mixed", "hot", max_new=20)
    world.step()
    cold = world.add("mixed", "cold")
    for _ in range(2000):
        while world.scheduler.num_waiting < 330:
            world.add("cold ones", f"c{next(count)}", prompt_len=1, max_new=10)
            world.add("mixed", "hot", max_new=20)
        if cold in world.step():
            break
    assert cold in names(world.started)


def test_a_step_has_no_more_adapters_than_is_allowed():
    world = World(max_batch_adapters=2, device_bytes=1000)
    for index in range(30):
        world.add("t", f"a{index % 5}")
        world.add("t", None)
    while world.scheduler.sequences:
        world.step()
        assert len({sequence.adapter_hash for sequence in world.scheduler.running} - {""}) <= 2
        assert world.clock.now < 1100


def test_the_bound_on_adapters_does_not_keep_the_base_from_starting_where_adapters_and_tokens_share_memory():
    world = World(max_batch_adapters=1, device_bytes=1000, max_batch_size=4, shares_memory=True)
    world.add("t", "hot", max_new=200, prompt_len=2)
    world.step()
    world.add("t", "cold")
    for _ in range(250):  # 2.5 s
        world.step()
        base = world.add("t", None, max_new=1)
        assert base in world.step()
        if "cold" in {sequence.adapter_hash for sequence in world.started}:
            break
    assert world.scheduler.queue._refused_at or world.finished


def test_an_adapter_that_lacks_blocks_is_not_kept_out_by_tokens_for_ever():
    """Adapters lie among the blocks (an arena): the base's sequences never leave enough of them by themselves."""
    world = World(device_bytes=1000, max_batch_size=8, num_blocks=40, shares_memory=True, prefix_caching=False)
    world.tiers._carrier.place = lambda host: host if world.pool.num_used <= 4 else None
    lengths = itertools.cycle(range(11, 31, 3))
    for _ in range(40):
        world.add("base", None, max_new=next(lengths))
    for _ in range(20):
        world.step()
    cold, asked_at = world.add("t", "cold"), world.clock.now
    while cold not in world.step():
        world.add("base", None, max_new=next(lengths))
        assert world.clock.now - asked_at < FairQueue.MAX_OVERTAKEN_S + 35 * world.step_s
    assert world.clock.now - asked_at > FairQueue.MAX_OVERTAKEN_S
    world.run()


def test_who_is_gone_and_owes_nothing_is_forgotten():
    world = World(max_batch_size=8, num_blocks=400)
    for index in range(3000):
        world.add(f"tenant {index}", f"adapter {index}")
        world.step()
    world.run()
    queue = world.scheduler.queue
    assert len(queue._tenants) < 400 and sum(len(lines) for lines in queue._lines.values()) < 400


def test_a_preempted_sequence_comes_before_all_others():
    world = World(num_blocks=8, max_batch_size=4)
    for _ in range(4):
        world.add("greedy", prompt_len=4, max_new=20)
    for _ in range(8):
        world.step()
    for index in range(6):
        world.add(f"other {index}", prompt_len=4, max_new=4)
    world.run()
    assert world.scheduler.num_preemptions > 0
    order = names(world.finished)
    assert order.index("4") < order.index("6")  # it started before, and gave way to its tenant's older ones alone

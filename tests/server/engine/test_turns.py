"""How long an adapter keeps its turn among its tenant's: what waits together runs together, and nobody waits for it for long."""

from tests.server.engine.worlds import World, names


def test_an_adapter_keeps_its_turn_for_a_steps_tokens_and_then_the_others_have_theirs():
    world = World(max_batch_size=1, max_batch_tokens=64)  # a request costs 5 + 4 x 2: five of them use a turn up
    for adapter in "abc" * 12:
        world.add("t", adapter)
    world.run()
    assert "".join(s.adapter_hash for s in world.started) == "aaaaabbbbbcccccaaaaabbbbbcccccaabbcc"


def test_what_waits_together_runs_together():
    """Of 24 adapters' requests a batch of 16 has two adapters at a time, three where one ends and another begins."""
    world, most = World(max_batch_size=16, max_batch_tokens=256, num_blocks=200, device_bytes=10**6), 0
    for index in range(24 * 8):
        world.add("t", f"a{index % 24}")
    while world.scheduler.sequences:
        world.step()
        most = max(most, len({s.adapter_hash for s in world.scheduler.running}))
    assert most <= 3 and len(world.finished) == 24 * 8


def test_who_comes_while_one_adapter_alone_waits_is_next():
    """No turn is kept against nobody: a flood for one adapter makes a newcomer wait for one place."""
    for flooded in (3, 30):
        world = World(max_batch_size=1, max_batch_tokens=64)
        for _ in range(60):
            world.add("t", "flood")
        while len(world.started) < flooded:
            world.step()
        world.add("t", "quiet", name="quiet")
        world.run()
        assert names(world.started).index("quiet") <= flooded + 1


def test_a_newcomer_waits_for_one_turn_at_most():
    world = World(max_batch_size=1, max_batch_tokens=64)
    for adapter in "ab" * 60:
        world.add("t", adapter)
    while len(world.started) < 17:
        world.step()
    world.add("t", "quiet", name="quiet")
    world.run()
    assert names(world.started).index("quiet") <= 17 + 2 * 5


def test_tenants_keep_no_turns():
    world = World(max_batch_size=1, max_batch_tokens=64)
    for tenant in "tu" * 20:
        world.add(tenant, tenant)
    world.run()
    assert "".join(s.request.tenant for s in world.started) == "tu" * 20

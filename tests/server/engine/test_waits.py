"""How long a sequence may wait: who is told at once that it would be too long, and who is told in the end."""

import msgspec
import pytest

from server.api.outcome import unless_failed
from server.engine.failures import failure
from server.errors import Overloaded
from server.types import SequenceOutput
from tests.server.engine.worlds import World


def busy_world(max_queue_s=2.0, **options):
    """One row, a request in 0.1 s, 40 requests of one tenant: 4 s of work."""
    world = World(max_batch_size=1, max_queue_s=None, step_s=0.025, **options)
    for _ in range(80):
        world.add("busy", max_new=4)
    for _ in range(160):
        world.step()
    world.scheduler._waits.max_queue_s = max_queue_s
    return world


def test_who_would_wait_for_too_long_is_told_at_once_and_when_to_come_again():
    world = busy_world()
    with pytest.raises(Overloaded, match=r"the request would wait 4\.\d s for its turn, and may wait 2 s") as refused:
        world.add("busy", name="late")
    assert refused.value.retry_after_s == pytest.approx(2.0, abs=0.5) and refused.value.status == 429
    assert "late" not in world.scheduler.sequences
    world.run()
    world.add("busy", name="late")  # nobody is before it any more
    world.run()
    assert len(world.finished) == 81


def test_a_tenant_that_is_next_by_right_is_not_refused_for_anothers_queue():
    world = busy_world()
    world.add("quiet", name="quiet")
    for _ in range(8):
        world.step()
    assert "quiet" in [sequence.request.request_id for sequence in world.started]


def test_the_estimate_counts_the_others_shares_and_weights():
    world = busy_world(max_queue_s=None)
    for _ in range(10):
        world.add("half", weight=1.0)
        world.add("double", weight=2.0)
    before = {name: world.scheduler.queue.work_before(world.scheduler.sequences[world.add(name)]) for name in ("half", "double")}
    each = world.scheduler._waits.work(world.started[0])
    assert before["half"] == pytest.approx(11 * each * 4) and before["double"] == pytest.approx(11 * each * 4 / 2)


def test_nobody_is_refused_before_anything_was_measured():
    world = World(max_batch_size=1, max_queue_s=0.001)
    for _ in range(50):
        world.add()
    assert world.scheduler.num_waiting == 50


def test_who_waits_has_an_answer_when_its_time_is_up_and_who_runs_goes_on():
    world = World(max_batch_size=1, max_queue_s=1.0, step_s=0.1)
    running, waiting = world.add(max_new=50), world.add()
    for _ in range(9):
        world.step()
    assert not world.failed and waiting in world.scheduler.sequences
    for _ in range(3):
        world.step()
    assert [(s.request.request_id, type(e)) for s, e in world.failed] == [(waiting, Overloaded)]
    assert "has waited 1 s for its first step" in str(world.failed[0][1])
    world.run()
    assert [s.request.request_id for s in world.finished] == [running]


def test_the_end_of_a_wait_wakes_an_engine_with_nothing_to_run():
    """A sequence that waits for an adapter which never comes has an answer too."""
    world = World(max_queue_s=1.0)
    world.tiers._readers.read = lambda ref: None
    name = world.add("t", "never")
    world.step()
    assert not world.scheduler.has_work
    world.clock.now += 1.0
    assert world.scheduler.has_work
    world.step()
    assert [s.request.request_id for s, _ in world.failed] == [name] and not world.scheduler.has_work


def test_a_preempted_sequence_has_started_and_is_never_told_to_go():
    world = World(num_blocks=6, max_batch_size=3, max_queue_s=0.05, step_s=0.01, prefix_caching=False)
    for _ in range(3):
        world.add(prompt_len=4, max_new=12)
    world.run()
    assert world.scheduler.num_preemptions > 0 and len(world.finished) == 3 and not world.failed


def test_the_callers_error_says_when_to_come_again():
    output = failure("r", Overloaded("full", retry_after_s=7.0))
    with pytest.raises(Overloaded, match="full") as raised:
        unless_failed(msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=SequenceOutput))
    assert raised.value.retry_after_s == 7.0

"""The scheduler by itself, with a model that is only a rule: who runs when, who waits for what, nothing lost."""

import random
import time
from types import SimpleNamespace

import pytest

from server.engine.scheduler import BACKLOG_SHARE, MIN_PROMPT_TOKENS, Scheduler
from server.memory.blocks import BlockPool
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.types import AdapterRef, EngineRequest, SamplingParams


def make(num_blocks=16, max_batch_tokens=8, max_batch_size=4, device_bytes=100, read=None, **options):
    carrier = Carrier(read or (lambda ref: SimpleNamespace(bytes=int(ref.path))), lambda host: host)
    tiers = AdapterTiers(carrier, host_bytes=10**6, device_bytes=device_bytes)
    pool = BlockPool(num_blocks, 4)
    return Scheduler(pool, tiers, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, **options)


def request(name, prompt_len=5, max_new=4, adapter=None, size=10, salt="", offset=0):
    ref = AdapterRef(adapter, str(size), adapter) if adapter else None
    tokens = [(7 * i + offset) % 50 for i in range(prompt_len)]
    return EngineRequest(name, tokens, SamplingParams(max_new_tokens=max_new), ref, salt)


def step(scheduler, finished=None):
    """One step of a model that always says 1; returns {request: tokens}."""
    scheduler.collect_failed()
    chunks = scheduler.schedule()
    for chunk in chunks:
        scheduler.advance(chunk)
        if chunk.samples:
            chunk.sequence.learn(1)
        scheduler.publish(chunk.sequence)
        if chunk.samples and chunk.sequence.num_outputs >= chunk.sequence.request.params.max_new_tokens:
            scheduler.remove(chunk.sequence.request.request_id)
            if finished is not None:
                finished.append(chunk.sequence)
    return {chunk.sequence.request.request_id: chunk.num_tokens for chunk in chunks}


def test_decode_rows_come_before_a_long_prompt():
    scheduler = make()
    scheduler.add(request("a", prompt_len=3))
    assert step(scheduler) == {"a": 3}
    scheduler.add(request("long", prompt_len=30, offset=3))
    assert step(scheduler) == {"a": 1, "long": 7}
    assert step(scheduler) == {"a": 1, "long": 7}


def test_beside_rows_that_decode_prompts_have_a_share_of_what_waits():
    scheduler = make(num_blocks=20000, max_batch_tokens=4096, max_batch_size=64, max_sequence_len=20000, prefix_caching=False)
    scheduler.add(request("alone", prompt_len=3000, max_new=50))
    assert step(scheduler) == {"alone": 3000}  # nobody decodes: nobody would be delayed
    scheduler.add(request("short", prompt_len=1000))
    assert step(scheduler) == {"alone": 1, "short": MIN_PROMPT_TOKENS}
    assert step(scheduler) == {"alone": 1, "short": 1000 - MIN_PROMPT_TOKENS}
    scheduler.add(request("long", prompt_len=16000))
    seen, left = [], 16000
    while left:
        chunks = step(scheduler)
        seen.append(chunks.pop("long"))
        assert chunks and seen[-1] == min(left, 4096 - len(chunks), max(MIN_PROMPT_TOKENS, left // BACKLOG_SHARE))
        left -= seen[-1]
    assert seen[0] > 4000 and seen[-2] == MIN_PROMPT_TOKENS
    for i in range(60):  # most of them have no row yet: what waits counts as a whole
        scheduler.add(request(f"{i}", prompt_len=1000, offset=i))
    assert sum(step(scheduler).values()) == 4096
    for i in range(60):
        scheduler.remove(f"{i}")
    scheduler.add(request("one more", prompt_len=1000))
    assert step(scheduler)["one more"] == MIN_PROMPT_TOKENS


def test_a_batch_never_exceeds_its_bounds_and_everybody_finishes():
    rng = random.Random(0)
    scheduler, finished = make(num_blocks=12), []
    for i in range(60):
        scheduler.add(request(str(i), rng.randrange(1, 20), rng.randrange(1, 12), offset=i))
    for _ in range(3000):
        chunks = step(scheduler, finished)
        assert sum(chunks.values()) <= 8 and len(scheduler.running) <= 4
        if not scheduler.has_work:
            break
    assert len(finished) == 60 and scheduler.pool.num_used == 0
    assert scheduler.num_preemptions > 0  # 12 blocks are too few for four of the longest: some were computed twice


def test_preempted_sequences_keep_their_tokens_and_their_place():
    scheduler, finished = make(num_blocks=6, max_batch_size=3, prefix_caching=False), []
    for name in "abc":
        scheduler.add(request(name, prompt_len=4, max_new=12, offset=ord(name)))
    for _ in range(200):
        step(scheduler, finished)
    assert [s.request.request_id for s in finished] == ["a", "b", "c"]  # the youngest gave way
    assert all(len(s.tokens) == 16 for s in finished) and scheduler.num_preemptions > 0


def test_a_known_prefix_is_not_computed_again_unless_adapter_or_salt_differ():
    scheduler = make()
    scheduler.add(request("a", prompt_len=8, max_new=1))
    step(scheduler)
    scheduler.add(request("again", prompt_len=8, max_new=1))
    assert step(scheduler) == {"again": 4}  # the block with the last token is computed: its logits are wanted
    scheduler.add(request("other-tenant", prompt_len=8, max_new=1, salt="t"))
    assert step(scheduler) == {"other-tenant": 8}
    scheduler.add(request("adapted", prompt_len=8, max_new=1, adapter="x"))
    deadline = time.monotonic() + 5
    while not (chunks := step(scheduler)) and time.monotonic() < deadline:
        pass
    assert chunks == {"adapted": 8}


def test_others_pass_a_sequence_that_waits_for_its_adapter():
    gate = []

    def read(ref):
        while not gate:
            time.sleep(0.005)
        return SimpleNamespace(bytes=1)

    scheduler = make(read=read)
    scheduler.add(request("cold", adapter="x"))
    scheduler.add(request("base", offset=2))
    assert step(scheduler) == {"base": 5}
    gate.append(True)
    deadline = time.monotonic() + 5
    while "cold" not in step(scheduler):
        assert time.monotonic() < deadline


def test_removal_frees_everything_wherever_the_sequence_is():
    scheduler = make(max_batch_size=1, read=lambda ref: time.sleep(0.05) or SimpleNamespace(bytes=1))
    scheduler.add(request("running"))
    step(scheduler)
    scheduler.add(request("waiting", offset=1))
    scheduler.add(request("parked", adapter="x"))
    for name in ("running", "waiting", "parked"):
        assert scheduler.remove(name) is not None
    assert scheduler.remove("running") is None
    assert scheduler.pool.num_used == 0 and scheduler.num_waiting == 0 and not scheduler.schedule()


def test_a_failed_adapter_fails_those_who_asked_for_it_alone():
    def read(ref):
        raise OSError("disk")

    scheduler, failed = make(read=read), []
    scheduler.add(request("a", adapter="x"))
    scheduler.add(request("b", adapter="x"))
    scheduler.add(request("c"))
    deadline = time.monotonic() + 5
    while len(failed) < 2 and time.monotonic() < deadline:
        failed += scheduler.collect_failed()
    assert {s.request.request_id for s, _ in failed} == {"a", "b"} and scheduler.num_waiting == 1
    assert not scheduler.tiers._entries


def test_what_can_never_run_is_refused_at_once():
    scheduler = make(num_blocks=4)
    with pytest.raises(ValueError, match="17 tokens do not fit; a sequence has at most 16"):
        scheduler.add(request("a", prompt_len=10, max_new=7))
    with pytest.raises(ValueError, match="at least one"):
        scheduler.add(request("a", prompt_len=0))
    with pytest.raises(ValueError, match="at least one"):
        scheduler.add(request("a", max_new=0))
    for token in (-1, 1 << 32):
        with pytest.raises(ValueError, match="token ids"):
            scheduler.add(EngineRequest("a", [1, token], SamplingParams(max_new_tokens=1)))
    scheduler.add(request("a"))
    with pytest.raises(KeyError):
        scheduler.add(request("a"))
    assert make(max_sequence_len=9).max_sequence_len == 9


def test_ids_beyond_the_vocabulary_are_refused_before_they_reach_the_device():
    scheduler = make(vocab_size=lambda adapter_hash: 60 if adapter_hash else 40)
    with pytest.raises(ValueError, match="token id 48 is not in the vocabulary of 40"):
        scheduler.add(EngineRequest("a", [48], SamplingParams(max_new_tokens=1)))
    scheduler.add(EngineRequest("b", [48], SamplingParams(max_new_tokens=1), AdapterRef("x", "1", "x")))  # the adapter added tokens
    scheduler.add(EngineRequest("c", [70], SamplingParams(max_new_tokens=1), AdapterRef("x", "1", "x")))
    deadline, failed, ran = time.monotonic() + 5, [], {}
    while not (failed and ran) and time.monotonic() < deadline:
        failed += scheduler.collect_failed()
        ran |= {chunk.sequence.request.request_id: chunk.num_tokens for chunk in scheduler.schedule()}
    assert ran == {"b": 1}
    assert [(s.request.request_id, str(e)) for s, e in failed] == [("c", "token id 70 is not in the vocabulary of 60")]


def test_an_adapter_that_cannot_be_placed_fails_its_own_sequence():
    scheduler, failed = make(), []

    def place(host):
        raise MemoryError("device")

    scheduler.tiers._carrier.place = place
    scheduler.add(request("a", adapter="x"))
    scheduler.add(request("b"))
    ran, deadline = {}, time.monotonic() + 5
    while not (failed and ran) and time.monotonic() < deadline:
        failed += scheduler.collect_failed()
        ran |= {chunk.sequence.request.request_id: chunk.num_tokens for chunk in scheduler.schedule()}
    assert ran == {"b": 5} and [(s.request.request_id, type(e).__name__) for s, e in failed] == [("a", "GenerationFailed")]
    assert scheduler.num_waiting == 0


def test_a_sequence_of_this_step_is_never_preempted_for_another():
    """Older and younger run; the older one's prompt needs more blocks than are free while the younger one already has its row."""
    gate = []

    def read(ref):
        while not gate:
            time.sleep(0.001)
        return SimpleNamespace(bytes=1)

    scheduler = make(num_blocks=8, max_batch_tokens=12, max_batch_size=2, read=read, prefix_caching=False)
    scheduler.add(request("old", prompt_len=24, max_new=4, adapter="x"))
    scheduler.add(request("young", prompt_len=8, max_new=20, offset=3))
    step(scheduler)
    gate.append(True)
    deadline, finished = time.monotonic() + 5, []
    while scheduler.tiers.state("x") != "host" and time.monotonic() < deadline:
        scheduler.tiers.arrived.wait(0.01)
        scheduler.collect_failed()
    while len(finished) < 2 and time.monotonic() < deadline:
        scheduler.collect_failed()
        chunks = scheduler.schedule()
        for chunk in chunks:
            assert len(chunk.sequence.blocks) * 4 >= chunk.sequence.num_computed + chunk.num_tokens
        for chunk in chunks:
            scheduler.advance(chunk)
            if chunk.samples:
                chunk.sequence.learn(1)
                if chunk.sequence.num_outputs >= chunk.sequence.request.params.max_new_tokens:
                    scheduler.remove(chunk.sequence.request.request_id)
                    finished.append(chunk.sequence)
    assert len(finished) == 2 and scheduler.num_preemptions > 0


def test_the_base_runs_while_an_adapter_waits_for_room():
    scheduler = make(device_bytes=10, max_batch_size=8, num_blocks=64)
    scheduler.queue.MAX_OVERTAKEN_S = 0.0
    for name in ("hot", "cold"):
        scheduler.add(request(name, adapter=name, max_new=30))
        deadline = time.monotonic() + 5
        while scheduler.tiers.state(name) not in ("host", "device") and time.monotonic() < deadline:
            scheduler.collect_failed()
        step(scheduler)
    assert [s.request.request_id for s in scheduler.running] == ["hot"]
    scheduler.add(request("base", offset=5))
    assert "base" in step(scheduler)


def test_waiting_for_blocks_does_not_wear_the_tiers():
    scheduler = make(num_blocks=4, device_bytes=10)
    scheduler.add(request("big", prompt_len=8, max_new=8))
    step(scheduler)
    scheduler.add(request("a", prompt_len=8, adapter="x"))
    deadline = time.monotonic() + 5
    while scheduler.tiers.state("x") != "host" and time.monotonic() < deadline:
        scheduler.collect_failed()
    for _ in range(5):
        scheduler.schedule()
    assert scheduler.tiers.state("x") == "host" and scheduler.tiers._entries["x"].uses == 0

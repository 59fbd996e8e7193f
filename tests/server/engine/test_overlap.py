"""The engine's tests again with overlapping steps: a step is launched before the last one's tokens are looked at."""

import json

import pytest
import torch

from server.engine.core import run_until_idle
from server.engine.runner import Launch
from server.types import EngineRequest, SamplingParams
from tests.server.engine.test_core import (  # noqa: F401 - collected here again
    engine,
    folders,
    prompt,
    test_a_bad_pack_fails_those_who_asked_for_it,
    test_a_lost_device_ends_the_engine_not_every_request_one_by_one,
    test_a_replaced_adapter_never_reads_its_predecessors_cache,
    test_abort_frees_everything_within_a_step,
    test_an_adapter_whose_numbers_overflow_fails_alone,
    test_cached_prefixes_change_no_text_and_are_used,
    test_many_adapters_at_once_each_answers_as_itself,
    test_preempted_sequences_say_the_same,
    test_stop_ids_logprobs_and_counters,
    test_the_text_is_the_same_whatever_shares_the_batch,
    test_what_fails_in_a_step_fails_alone,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(autouse=True)
def overlapping(monkeypatch):
    monkeypatch.setenv("MANYLORA_TEST_ENGINE", json.dumps({"overlap": True}))


def steps_of(requests, **changes):
    core, _ = engine(**changes)
    for request in requests:
        core.add(request)
    said, launches = {}, []
    launch = core.runner.launch

    def note(chunks, before=None):
        launches.append([(chunk.sequence.request.request_id, chunk.sequence.num_unknown) for chunk in chunks])
        return launch(chunks, before)

    core.runner.launch = note
    for _ in range(200):
        if not (core.has_work or core.scheduler.num_waiting):
            break
        for output in core.step():
            said.setdefault(output.request_id, []).extend(output.token_ids)
    assert core.pool.num_used == 0
    return said, launches


def test_a_step_is_launched_with_tokens_that_are_not_known_yet():
    said, launches = steps_of([EngineRequest("a", prompt(1), SamplingParams(max_new_tokens=6))])
    assert launches == [[("a", 0)]] + [[("a", 1)]] * 5 and len(said["a"]) == 6


def test_a_stop_token_ends_the_text_and_the_row_that_ran_on_is_dropped():
    whole, _ = steps_of([EngineRequest("a", prompt(1), SamplingParams(max_new_tokens=8))])
    stop = whole["a"][3]
    params = SamplingParams(max_new_tokens=8, stop_token_ids=(stop,))
    said, launches = steps_of([EngineRequest("a", prompt(1), params)])
    first = whole["a"].index(stop)
    assert said["a"] == whole["a"][: first + 1] and len(launches) == first + 2


@pytest.mark.parametrize(
    "params", [dict(repetition_penalty=1.3), dict(frequency_penalty=0.8), dict(logit_bias={5: 3.0}), dict(num_logprobs=2)], ids=str
)
def test_what_needs_the_host_waits_for_it_and_only_while_it_is_there(params):
    asked = [
        EngineRequest("plain", prompt(1), SamplingParams(max_new_tokens=12)),
        EngineRequest("host", prompt(2), SamplingParams(max_new_tokens=4, **params)),
    ]
    together, launches = steps_of(asked)
    assert together == {k: v for request in asked for k, v in steps_of([request], overlap=False)[0].items()}
    unknown = [dict(launch).get("plain") for launch in launches]
    assert unknown[1:4] == [0, 0, 0] and 1 in unknown[5:]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_long_prompt_is_not_queued_on_the_device_as_a_whole(overlap, monkeypatch):
    """A step that draws nothing is waited for as others are: the host's buffers for two steps are not written by a third."""
    waited, follow = [], Launch.follow

    class Event:
        def record(self):
            waited.append(False)
            self.index = len(waited) - 1

        def synchronize(self):
            waited[self.index] = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Launch, "follow", lambda self, _, is_deferred: follow(self, torch.device("cuda"), is_deferred=is_deferred))
    core, _ = engine(overlap=overlap)
    launch, queued = core.runner.launch, []

    def note(chunks, before=None):
        queued.append(waited.count(False))
        return launch(chunks, before)

    core.runner.launch = note
    core.add(EngineRequest("a", prompt(1, 62), SamplingParams(max_new_tokens=2)))
    outputs = run_until_idle(core)
    assert [output.error for output in outputs] == [None, None] and len(queued) == 5
    assert queued == ([0, 1, 1, 1, 1] if overlap else [0] * 5) and all(waited)

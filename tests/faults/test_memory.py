"""Out of memory on the device: torch.OutOfMemoryError where the runner and the tiers allocate, on a CPU."""

import weakref

import pytest
import torch

from server.engine.core import run_until_idle
from server.types import EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.test_core import engine, prompt, run, texts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def wanted(num, max_new=8):
    return [EngineRequest(str(i), prompt(i), SamplingParams(max_new_tokens=max_new)) for i in range(num)]


class Room:
    """So many bytes of embeddings may be alive at a time; the allocation that passes it fails as torch's does."""

    def __init__(self, core, num_tokens):
        self.base, self.num_tokens, self.used, self.num_failures = core.runner.base, num_tokens, 0, 0
        self._embed = self.base.embed
        self.base.embed = self.embed

    def embed(self, ids):
        if self.used + len(ids) > self.num_tokens:
            self.num_failures += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(ids)} rows")
        found = self._embed(ids)
        self.used += len(ids)
        weakref.finalize(found, self.free, len(ids))
        return found

    def free(self, num):
        self.used -= num


@pytest.mark.fault(
    "Memory", "out of GPU memory in a step", "nothing: the step is run by halves, and later steps have fewer tokens",
    "the same texts; the failed step's tensors are freed before the halves are tried",
)  # fmt: skip
def test_a_step_without_room_is_run_in_smaller_ones():
    alone, _ = engine()
    expected = run(alone, wanted(6))
    core, _ = engine(max_batch_tokens=64, max_batch_size=8)
    room = Room(core, 40)  # six prompts of twelve tokens are too many
    decode = core.runner.base.decode

    def decode_and_fail(embeddings, positions):
        """The first failure comes late, while the step's tensors are alive."""
        if room.num_failures == 0 and room.used > 30:
            room.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(embeddings, positions)

    core.runner.base.decode = decode_and_fail
    assert run(core, wanted(6)) == expected and room.num_failures > 0
    assert core.scheduler.max_batch_tokens < 64 and core.pool.num_used == 0
    failures = room.num_failures
    assert run(core, wanted(6)) == expected and room.num_failures <= failures + 1  # it was learned


def test_a_prompt_that_is_too_long_for_one_step_is_read_in_several():
    long = [EngineRequest("long", prompt(1, 60), SamplingParams(max_new_tokens=3))]
    alone, _ = engine()
    expected = run(alone, long)
    core, _ = engine(max_batch_tokens=64, max_batch_size=4)
    Room(core, 20)
    assert run(core, long) == expected and core.scheduler.max_batch_tokens <= 20


@pytest.mark.fault(
    "Memory", "out of GPU memory for one request whatever is tried", "an error, 424, in its own request alone", "go on, the same texts",
)  # fmt: skip
def test_the_one_that_cannot_fit_fails_alone():
    alone, _ = engine()
    expected = run(alone, wanted(5))
    core, _ = engine()
    launch = core.runner.launch

    def faulty(chunks, before=None):
        if any(chunk.sequence.request.request_id == "3" and chunk.sequence.num_outputs for chunk in chunks):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(chunks, before)

    core.runner.launch = faulty
    for request in wanted(5):
        core.add(request)
    outputs = run_until_idle(core)
    ends = {output.request_id: (output.finish_reason, output.error_kind) for output in outputs if output.finish_reason}
    assert ends.pop("3") == ("error", "GenerationFailed") and set(ends.values()) == {("length", None)}
    del expected["3"]
    assert texts([output for output in outputs if output.request_id != "3"]) == expected and core.pool.num_used == 0


@pytest.mark.fault(
    "Memory", "out of GPU memory while an adapter is put there", "nothing: an adapter that nobody needs leaves first",
    "if none can leave, the requests for this adapter end with 424; the next ones try again",
)  # fmt: skip
def test_an_adapter_without_room_pushes_an_idle_one_out(tmp_path):
    core, base = engine()
    refs = [pack(save_adapter(tmp_path / name, "llama", seed=n), base.layout, tmp_path / f"{name}.pack") for n, name in enumerate("ab")]

    def ask(name, ref):
        return [EngineRequest(name, prompt(0), SamplingParams(max_new_tokens=2), ref)]

    expected = run(core, ask("b", refs[1]))["b"]
    core.tiers.forget(refs[1].hash)
    run(core, ask("a", refs[0]))
    place, num_full = core.tiers._carrier.place, [0]

    def full(host):
        if core.tiers.device.count or num_full[0] < 0:
            num_full[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return place(host)

    core.tiers._carrier.place = full
    assert run(core, ask("b", refs[1]))["b"] == expected and num_full[0] == 1 and core.tiers.state(refs[0].hash) == "host"
    core.tiers.forget(refs[1].hash)
    num_full[0] = -1000  # from now on never
    for request in (*ask("c", refs[1]), EngineRequest("base", prompt(0), SamplingParams(max_new_tokens=2))):
        core.add(request)
    ends = {output.request_id: output for output in run_until_idle(core) if output.finish_reason}
    assert ends["base"].finish_reason == "length" and "OutOfMemoryError" in ends["c"].error and ends["c"].error_kind == "GenerationFailed"
    core.tiers._carrier.place = place
    assert run(core, ask("d", refs[1]))["d"] == expected

"""The engine's promises about one request among others: same text, own faults, everything freed."""

import random

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.core import run_until_idle
from server.model.attention import ATTENTION_NAME
from server.types import AdapterRef, EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.tiny_models import VOCAB, make_engine, make_model

# PEFT warns about what it saves and about tied weights; what it means here is what the tests compare.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(root / "one", "llama", seed=1)
    save_adapter(root / "two", "llama", seed=2, target_modules=["gate_proj", "down_proj"], r=3)
    return root


def engine(**changes):
    return make_engine(make_model("llama", attention=ATTENTION_NAME), **changes)


def prompt(seed, length=12):
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def texts(outputs):
    found = {}
    for output in outputs:
        assert output.finish_reason != "error", output.error
        found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def requests(refs, num=10, max_new=10):
    kinds = [
        {},
        dict(temperature=0.9, top_p=0.9),
        dict(temperature=1.5, top_k=7),
        dict(repetition_penalty=1.4),
        dict(frequency_penalty=1.0),
    ]
    return [
        EngineRequest(
            str(i), prompt(i, 3 + 5 * (i % 5)), SamplingParams(max_new_tokens=max_new, seed=i, **kinds[i % len(kinds)]), refs[i % len(refs)]
        )
        for i in range(num)
    ]


def run(core, wanted):
    for request in wanted:
        core.add(request)
    return texts(run_until_idle(core))


def test_the_text_is_the_same_whatever_shares_the_batch(folders, tmp_path):
    core, base = engine()
    refs = [None, pack(folders / "one", base.layout, tmp_path / "1"), pack(folders / "two", base.layout, tmp_path / "2")]
    wanted = requests(refs)
    together = run(core, wanted)
    for request in wanted:
        alone, _ = engine(prefix_caching=False)
        assert run(alone, [request])[request.request_id] == together[request.request_id]


def test_preempted_sequences_say_the_same(folders, tmp_path):
    core, base = engine(num_blocks=16)
    refs = [None, pack(folders / "one", base.layout, tmp_path / "1")]
    wanted = requests(refs, max_new=25)
    cramped = run(core, wanted)
    assert core.scheduler.num_preemptions > 0
    roomy, _ = engine(num_blocks=400)
    assert cramped == run(roomy, wanted)
    assert roomy.scheduler.num_preemptions == 0


def test_cached_prefixes_change_no_text_and_are_used(folders, tmp_path):
    core, base = engine(num_blocks=200)
    refs = [None, pack(folders / "one", base.layout, tmp_path / "1")]
    shared = prompt(99, 20)
    wanted = [
        EngineRequest(f"{name}-{i}", shared + prompt(i, 3), SamplingParams(max_new_tokens=6), ref)
        for i in range(3)
        for name, ref in zip(("base", "one"), refs, strict=True)
    ]
    first = {}
    for request in wanted:  # one after the other, so that the later ones find the earlier ones' blocks
        first.update(run(core, [request]))
    assert core.stats().num_cached_tokens >= 4 * 20
    plain, _ = engine(prefix_caching=False)
    assert first == run(plain, wanted)
    assert plain.stats().num_cached_tokens == 0
    assert {first["base-0"] == first["one-0"]} == {False}


def test_a_replaced_adapter_never_reads_its_predecessors_cache(folders, tmp_path):
    core, base = engine()
    tokens = prompt(5, 21)
    old = pack(folders / "one", base.layout, tmp_path / "old")
    new_header = pack(folders / "two", base.layout, tmp_path / "new")
    new = AdapterRef(new_header.hash, new_header.path, old.name)  # the same name, other contents
    params = SamplingParams(max_new_tokens=5)
    before = run(core, [EngineRequest("a", tokens, params, old)])["a"]
    after = run(core, [EngineRequest("b", tokens, params, new)])["b"]
    fresh, _ = engine()
    assert after == run(fresh, [EngineRequest("c", tokens, params, new)])["c"] != before


def test_abort_frees_everything_within_a_step(folders, tmp_path):
    core, base = engine()
    ref = pack(folders / "one", base.layout, tmp_path / "1")
    for i in range(4):
        core.add(EngineRequest(str(i), prompt(i), SamplingParams(max_new_tokens=40), ref if i % 2 else None))
    for _ in range(50):
        core.step()
        if len(core.scheduler.running) == 4:
            break
    for i in range(4):
        core.abort(str(i))
    core.abort("nobody")
    assert core.pool.num_used == 0 and not core.scheduler.running
    ended = [o for o in core.step() if o.finish_reason]
    assert sorted((o.request_id, o.finish_reason) for o in ended) == [(str(i), "aborted") for i in range(4)]


@pytest.mark.fault(
    "Engine", "a step that fails for one of its requests (an exception in the arithmetic)", "424 in that request alone",
    "the step is run by halves: the others say the same as without it",
)  # fmt: skip
def test_what_fails_in_a_step_fails_alone(folders, tmp_path):
    core, base = engine()
    wanted = requests([None, pack(folders / "one", base.layout, tmp_path / "1")], num=6)
    healthy = run(core, wanted)
    core, _ = engine()
    launch = core.runner.launch

    def faulty(chunks, before=None):
        if any(chunk.sequence.request.request_id == "3" for chunk in chunks) and core.num_steps > 3:
            raise RuntimeError("a fault in one request's arithmetic")
        return launch(chunks, before)

    core.runner.launch = faulty
    for request in wanted:
        core.add(request)
    outputs = run_until_idle(core)
    failed = [o for o in outputs if o.finish_reason == "error"]
    assert [(o.request_id, o.error_kind) for o in failed] == [("3", "GenerationFailed")]
    assert "RuntimeError" in failed[0].error and "arithmetic" not in failed[0].error
    assert {k: v for k, v in texts([o for o in outputs if o.request_id != "3"]).items()} == {k: v for k, v in healthy.items() if k != "3"}
    assert core.pool.num_used == 0


def test_an_adapter_whose_numbers_overflow_fails_alone(folders, tmp_path):
    huge = tmp_path / "huge"
    save_adapter(huge, "llama", seed=3)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file({k: v * 1e30 for k, v in tensors.items()}, huge / "adapter_model.safetensors")
    core, base = engine()
    wanted = [
        EngineRequest("base", prompt(0), SamplingParams(max_new_tokens=8)),
        EngineRequest("bad", prompt(1), SamplingParams(max_new_tokens=8), pack(huge, base.layout, tmp_path / "p")),
    ]
    for request in wanted:
        core.add(request)
    outputs = run_until_idle(core)
    assert "not finite" in next(o.error for o in outputs if o.request_id == "bad" and o.finish_reason == "error")
    alone, _ = engine()
    assert texts([o for o in outputs if o.request_id == "base"]) == run(alone, wanted[:1])


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "weight", "other-base"])
def test_a_bad_pack_fails_those_who_asked_for_it(damage, folders, tmp_path):
    core, base = engine()
    good = pack(folders / "one", base.layout, tmp_path / "good")
    layout = msgspec.structs.replace(base.layout, fingerprint="0" * 32) if damage == "other-base" else base.layout
    bad = pack(folders / "two", layout, tmp_path / "bad")
    data = bytearray((tmp_path / "bad").read_bytes())
    if damage == "missing":
        (tmp_path / "bad").unlink()
    elif damage == "truncated":
        (tmp_path / "bad").write_bytes(data[:-100])
    elif damage in ("flipped", "weight"):
        data[60 if damage == "flipped" else -500] ^= 0xFF
        (tmp_path / "bad").write_bytes(data)
    params = SamplingParams(max_new_tokens=4)
    for name, ref in (("a", good), ("b", bad), ("c", bad), ("d", None)):
        core.add(EngineRequest(name, prompt(1), params, ref))
    outputs = run_until_idle(core)
    ends = {o.request_id: (o.finish_reason, o.error_kind) for o in outputs if o.finish_reason}
    refused = ("error", "AdapterRefused")
    assert ends == {"a": ("length", None), "b": refused, "c": refused, "d": ("length", None)}
    assert all(str(tmp_path) not in (o.error or "") for o in outputs)


def test_dora_holds_what_is_counted(tmp_path):
    """No autograd graph, no copy of the base's weights: what an adapter keeps alive is its own bytes."""
    core, base = engine()
    ref = pack(save_adapter(tmp_path / "dora", "llama", use_dora=True), base.layout, tmp_path / "dora.pack")
    run(core, [EngineRequest("a", prompt(0), SamplingParams(max_new_tokens=2), ref)])
    adapter = core.tiers._entries[ref.hash].device
    parts = [part for delta in adapter.groups if delta is not None for part in delta.parts]
    assert parts and all(tensor.grad_fn is None for part in parts for tensor in part if isinstance(tensor, torch.Tensor))
    new = sum(part.gain.nbytes + part.b.nbytes for part in parts)  # all else lies in the pack's data
    assert adapter.bytes == core.tiers._entries[ref.hash].host.bytes + new == core.tiers.device.used_bytes


def test_a_lost_device_ends_the_engine_not_every_request_one_by_one(folders):
    core, _ = engine()
    core.runner.launch = lambda *_: (_ for _ in ()).throw(torch.AcceleratorError("CUDA error: an illegal memory access"))
    core.add(EngineRequest("a", prompt(0), SamplingParams(max_new_tokens=2)))
    with pytest.raises(torch.AcceleratorError):
        core.step()


def test_a_second_request_of_an_id_does_not_end_the_first():
    core, _ = engine()
    request = EngineRequest("a", prompt(0), SamplingParams(max_new_tokens=4))
    core.add(request)
    core.add(request)
    ends = [output.finish_reason for output in run_until_idle(core) if output.finish_reason]
    assert ends == ["length"]


def test_stop_ids_logprobs_and_counters():
    core, _ = engine()
    free = run(core, [EngineRequest("a", prompt(3), SamplingParams(max_new_tokens=12))])["a"]
    stop = free[4]
    core.add(EngineRequest("b", prompt(3), SamplingParams(max_new_tokens=12, stop_token_ids=(stop,), num_logprobs=2)))
    outputs = run_until_idle(core)
    got = [t for o in outputs for t in o.token_ids]
    assert got == free[: free.index(stop) + 1] and outputs[-1].finish_reason == "stop"
    for output in outputs:
        logprob = output.logprobs[0]
        assert logprob.token_id == output.token_ids[0] == logprob.top[0][0] and len(logprob.top) == 2
    stats = core.stats()
    assert stats.num_output_tokens == 12 + len(got) and stats.num_prompt_tokens == 24 and stats.num_blocks_used == 0


def test_many_adapters_at_once_each_answers_as_itself(tmp_path):
    """Forty adapters that can each say two tokens only, in one queue over room for five: nobody gets another's."""
    core, base = engine(adapter_device_bytes=5 * 1024, max_batch_size=8)
    refs = []
    for i in range(40):
        folder = save_adapter(tmp_path / f"m{i}", "llama", target_modules=["lm_head"], r=1)
        tensors = load_file(folder / "adapter_model.safetensors")
        b = torch.zeros_like(tensors["base_model.model.lm_head.lora_B.weight"])
        b[10 + i], b[50 + i] = 1e4, -1e4  # one of the two wins, by the sign of the hidden state along A
        save_file({**tensors, "base_model.model.lm_head.lora_B.weight": b}, folder / "adapter_model.safetensors")
        refs.append(pack(folder, base.layout, tmp_path / f"m{i}.pack"))
    for i in range(120):
        core.add(EngineRequest(str(i), prompt(i), SamplingParams(max_new_tokens=3), refs[i % 40]))
    answers = run_until_idle(core)
    said = texts(answers)
    assert len(said) == 120 and core.tiers.device.used_bytes <= 5 * 1024 and core.tiers.device.count >= 4
    for name, tokens in said.items():
        own = 10 + int(name) % 40
        assert set(tokens) <= {own, own + 40}, name

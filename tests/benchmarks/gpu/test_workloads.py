"""The workloads are those that the results claim: sizes, fresh prompts, arrivals, and prompts that survive the way over HTTP."""

import pytest
from transformers import AutoConfig

from benchmarks.gpu.models import MODELS, as_text, linears, write_model
from benchmarks.gpu.plan import warm_up_cases
from benchmarks.gpu.workloads import FULL, TINY, offline_cases, poisson_times, throughput_case, zipf
from server.api.text.tokenizer import load_tokenizer


def test_the_cases_are_those_of_the_table():
    (base,), (few,), (many,) = (offline_cases(part, FULL) for part in ("offline-base", "offline-r16", "offline-r8"))
    assert {(case.num_requests, case.prompt_len, case.num_new) for case in (base, few, many)} == {(768, 256, 128)}
    assert set(base.picks()) == {None}
    assert (few.adapters.rank, few.adapters.modules, set(few.picks())) == (16, "all", set(range(25)))
    assert (many.adapters.rank, many.adapters.modules, len(set(many.picks()))) == (8, "qv", 768)  # every request another one
    decode = {case.name: case for case in offline_cases("decode", FULL)}
    assert [name.split()[0] for name in decode] == ["decode1"] * 2 + ["decode64"] * 3 + ["decode256"] * 3
    assert len(set(decode["decode64 r16-all x25"].picks())) == 25 and set(decode["decode256 r16-all x1"].picks()) == {0}


def test_no_prompt_comes_twice():
    cases = [*offline_cases("offline-base", TINY), *offline_cases("decode", TINY), throughput_case("http", TINY, TINY.few)]
    prompts = [tuple(prompt) for case in cases for repeat in (0, 1, 2) for prompt in case.prompts(32000, repeat)]
    assert len(set(prompts)) == len(prompts)
    assert cases[0].prompts(32000, 1) == cases[0].prompts(32000, 1)  # the same for every engine


def test_the_warm_up_reaches_every_adapter_and_every_set():
    cases = [case for part in ("offline-base", "offline-r16", "offline-r8") for case in offline_cases(part, FULL)]
    touched = {case.adapters: set(case.picks()) for case in warm_up_cases(cases) if case.name.endswith("touch")}
    assert touched == {FULL.few: set(range(25)), FULL.many: set(range(1000))}
    assert all(case.prompt_len + case.num_new <= TINY.max_sequence_len for case in warm_up_cases(offline_cases("decode", TINY)))


def test_arrivals():
    times = poisson_times(50.0, 60.0, "a")
    assert times == sorted(times) and times[-1] < 60.0 and 0.9 < len(times) / 3000 < 1.1
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert 0.85 < (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean < 1.15  # an exponential's deviation is its mean
    picks = zipf(20000, 2000, 1.0, "a")
    assert 1.7 < picks.count(0) / picks.count(1) < 2.3 and max(picks) < 2000


@pytest.mark.parametrize("model", MODELS)
def test_linears_are_those_of_the_architecture(model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_model(tmp_path, model)))
    modules = dict(built.named_modules())
    found = linears(model, "all")
    assert len(found) == 7 * built.config.num_hidden_layers
    for name, num_in, num_out in found:
        assert tuple(modules[name].weight.shape) == (num_out, num_in)
    assert {name.rsplit(".")[-1] for name, *_ in linears(model, "qv")} == {"q_proj", "v_proj"}


def test_a_prompt_as_text_is_the_same_ids_again(tmp_path):
    tokenizer = load_tokenizer(write_model(tmp_path, "mistral-7b"))
    ids = [3, 31999, 17, 17, 4, 0, 2]
    assert tokenizer.encode(as_text(ids)) == ids and tokenizer.num_ids == 32000
    assert not any(tokenizer.is_special(id) for id in range(32000))

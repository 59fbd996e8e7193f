"""What fits where, and what it costs: the article's figures among them."""

import dataclasses
import re

import pytest

from sizing.adapters import adapter_bytes
from sizing.errors import SizingError
from sizing.fit import Demand, Model, all_fits, article_bytes, check_demand, fit, nearest, saving
from sizing.instances import INSTANCES
from sizing.memory import EngineLimits, predict
from sizing.models import known_shape

G6, G6E, G6X4 = (INSTANCES[name] for name in ("g6.xlarge", "g6e.xlarge", "g6.12xlarge"))


def model(name="mistral-7b", scheme=None, **limits):
    shape = known_shape(name)
    return Model(shape=shape, limits=EngineLimits.of(shape, limits), scheme=scheme)


def demand(name="mistral-7b", rank=16, **changes):
    return Demand(bytes_of_adapter=adapter_bytes(known_shape(name), rank, ["all-linear"]), **changes)


def test_the_articles_example_fits_the_cheapest_instance():
    """Llama-2-7B in 16 bits, "15 GB", wants 22 GB by the rule; g6.xlarge has them."""
    llama = model("llama-2-7b")
    small = demand("llama-2-7b", rank=4, num_adapters=5)
    found = fit(llama, small, G6)
    assert found.fits and found.num_gpus == 1
    rule = article_bytes(llama, small, found.memory.weights.total)
    assert rule == pytest.approx(1.5 * (13.48e9 + 5 * small.bytes_of_adapter), rel=0.01) and rule < 22e9


def test_five_variants_on_one_instance_save_80_percent():
    """The article's figure, from prices: five instances of one variant each against one with all five as adapters."""
    found = fit(model("llama-2-7b"), demand("llama-2-7b", num_adapters=5), G6)
    each_alone = 5 * fit(model("llama-2-7b"), demand("llama-2-7b", num_adapters=0), G6).instance.usd_per_hour
    assert found.fits and 1 - found.instance.usd_per_hour / each_alone == pytest.approx(0.80)
    assert saving(5) == pytest.approx(0.80) and saving(1) == 0
    assert found.usd_per_adapter(5) == pytest.approx(0.8048 / 5)


def test_the_parts_of_a_card_add_up():
    found = fit(model(), demand(num_adapters=25, concurrency=16), G6)
    memory = found.memory
    assert found.adapters == 25 * 41 * memory.block_bytes and found.kv == 16 * 24 * memory.block_bytes  # blocks of 2 MiB
    assert memory.total - memory.block_bytes <= memory.card < memory.total + memory.block_bytes


def test_more_of_anything_leaves_less():
    few, many = (fit(model(), demand(num_adapters=count, concurrency=16), G6) for count in (1, 30))
    assert many.sequences <= few.sequences and many.full_tokens_per_s < few.full_tokens_per_s
    assert not fit(model(), demand(num_adapters=60), G6).fits


@pytest.mark.parametrize(
    ("changes", "limits", "reason"),
    [
        ({"concurrency": 64, "prompt_len": 3000}, {}, "GB short on each GPU"),
        ({"num_adapters": 40}, {"max_sequence_len": 512}, "adapters are .* over the adapters' share of .*server.adapter_device_bytes"),
        ({"concurrency": 65}, {}, "a GPU runs 64 sequences at once .server.max_batch_size."),
        ({}, {"kv_cache_bytes": 8 << 30}, "the KV blocks and adapter bytes that .server. names are .* GB more than each GPU has"),
        ({}, {"max_sequence_len": 32768, "max_batch_tokens": 32768}, "GB short on each GPU"),  # not one sequence of that length
    ],
)
def test_what_does_not_fit_says_why(changes, limits, reason):
    found = fit(model(**limits), demand(**changes), G6)
    assert not found.fits and found.missing > 0 and found.usd_per_million is None
    assert re.search(reason, found.reason), found.reason


def test_sequences_are_shared_out_among_gpus():
    wanted = demand(concurrency=100, prompt_len=900, output_len=100)
    assert fit(model(), wanted, G6X4).num_gpus == 3 and not fit(model(), wanted, G6).fits
    assert fit(model(), dataclasses.replace(wanted, concurrency=8), G6X4).num_gpus == 1


def test_engines_that_are_named_are_all_that_are_used():
    wanted = demand(concurrency=100, prompt_len=900, output_len=100)
    one = dataclasses.replace(model(), num_engines=1)
    assert not fit(one, wanted, G6X4).fits
    small = dataclasses.replace(wanted, concurrency=8)
    assert 4 * fit(one, small, G6X4).full_tokens_per_s == pytest.approx(fit(model(), small, G6X4).full_tokens_per_s)


def test_a_model_that_no_gpu_holds_is_not_held_by_several():
    assert not any(each.fits for each in all_fits(model("llama-3.1-70b"), demand("llama-3.1-70b")))


def test_the_nearest_that_fits_is_named():
    found, scheme = nearest(model("llama-2-13b"), demand("llama-2-13b"))
    assert (found.instance.name, scheme) == ("g6e.xlarge", None)
    found, scheme = nearest(model("llama-3.1-70b"), demand("llama-3.1-70b", rank=8))
    assert (found.instance.name, scheme) == ("g6e.xlarge", "int4")
    found, scheme = nearest(model("llama-2-13b"), demand("llama-2-13b"), [G6])
    assert (found.instance.name, scheme) == ("g6.xlarge", "fp8")
    assert nearest(model("llama-3.1-70b"), demand("llama-3.1-70b"), [G6]) is None


def test_a_step_in_fewer_bits_fits_more():
    whole, cut = (predict(known_shape("mistral-7b"), model().limits, G6.card.memory_bytes, 58, scheme=name) for name in (None, "int4"))
    assert cut.num_blocks > 2.5 * whole.num_blocks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_len": 4000, "output_len": 97}, "prompt and output: 4000 . 97 tokens are more than max_total_tokens 4096"),
        ({"concurrency": 0}, "concurrency must be at least 1. Given: 0"),
        ({"num_adapters": -1}, "adapters must be at least 0"),
    ],
)
def test_a_demand_that_cannot_be_is_refused_by_name(changes, said):
    with pytest.raises(SizingError, match=said):
        check_demand(model(), Demand(**changes))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_sequence_len": 40000}, "max_sequence_len 40000 is beyond the 32768 positions of mistral-7b"),
        ({"max_batch_tokens": 32}, "max_batch_tokens 32 must be at least max_batch_size 64"),
        ({"max_tokens": 1}, "max_tokens is not a limit of the engine. Allowed: adapter_device_bytes, "),
    ],
)
def test_limits_that_cannot_be_are_refused_by_name(limits, said):
    with pytest.raises(SizingError, match=said):
        model(**limits)


@pytest.mark.parametrize(
    ("rank", "targets", "said"),
    [
        (171, ["all-linear"], r"rank: 171 is over the limit: the kernels take 512 ranks at once and 3 .*Allowed: 1 to 170"),
        (513, ["q_proj"], r"rank: 513 is over the limit: the kernels take 512 ranks at once\. Allowed: 1 to 512"),
        (0, ["q_proj"], "rank: 0 is over the limit"),
        (8, ["query"], "targets: mistral-7b has no linear query. Allowed: all-linear, down_proj, "),
        (8, [], "targets: none was named"),
    ],
)
def test_an_adapter_that_the_kernels_do_not_take_is_refused_by_name(rank, targets, said):
    with pytest.raises(SizingError, match=said):
        adapter_bytes(known_shape("mistral-7b"), rank, targets)


def test_keys_and_values_in_one_byte_are_twice_the_tokens_and_read_in_half_the_time():
    plain, small = (fit(model(kv_cache_dtype=kv), demand(num_adapters=1, concurrency=64), G6) for kv in ("auto", "fp8"))
    assert plain.memory.block_bytes == 2 * small.memory.block_bytes == 16 * 131072
    assert small.memory.max_tokens == pytest.approx(2 * plain.memory.max_tokens, rel=0.001)
    assert small.memory.room == plain.memory.room and small.kv * 2 == plain.kv
    of_kv = 64 * (256 + 64) * 131072 / 2
    assert plain.speed.base_ms - small.speed.base_ms == pytest.approx(of_kv / (300e6 * plain.speed.base_efficiency))
    assert small.speed.is_projection
    with pytest.raises(SizingError, match="kv_cache_dtype must be one of auto, fp8. Given: fp8_e5m2"):
        model(kv_cache_dtype="fp8_e5m2")

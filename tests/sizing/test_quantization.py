"""The schemes by their names and LoRAX's, and what they make of a weight."""

from dataclasses import replace

import pytest

from sizing.errors import SizingError
from sizing.models import known_shape
from sizing.quantization import ALIASES, SCHEMES, scheme_named
from sizing.weights import weights_of


def test_every_alias_is_of_a_scheme():
    assert set(ALIASES.values()) <= set(SCHEMES) and not set(ALIASES) & set(SCHEMES)
    assert {scheme_named(name).name for name in ALIASES} == set(ALIASES.values())


@pytest.mark.parametrize(
    ("scheme", "num_bytes"),  # of [1024, 4096]
    [
        ("bf16", 1024 * 4096 * 2),
        ("fp8", 1024 * (4096 + 4)),
        ("int4", 1024 * (2048 + 32 * 4)),
        ("int8", 1024 * (4096 + 4)),
        ("awq", 1024 * (2048 + 32 * 4)),
        ("gptq", 1024 * (2048 + 32 * 4) + 4096 * 8),
        ("nf4", 1024 * (2048 + 64 * 2)),
        ("hqq", 1024 * (2048 + 64 * 4)),
    ],
)
def test_a_weight_takes_its_values_and_its_scales(scheme, num_bytes):
    assert scheme_named(scheme).num_bytes(1024, 4096) == num_bytes


def test_a_group_that_is_not_full_takes_a_whole_scale():
    assert scheme_named("awq").num_bytes(1, 129) == 2 * 64 + 2 * 4  # and a unit that is not full a whole one's words
    assert scheme_named("awq").file_bytes(2, 129) == round(2 * (129 / 2 + 2 * 2.5))


def test_what_the_files_have_beyond_the_shape_is_told_by_the_files_own_bytes():
    shape = replace(known_shape("mistral-7b"), quantization="awq")
    in_files = sum(scheme_named("awq").file_bytes(each.out_features, each.in_features) for group in shape.groups for each in group)
    plain = weights_of(known_shape("mistral-7b"))
    rest = plain.embedding + plain.head + plain.other
    whole = weights_of(shape)
    assert whole.total - rest > in_files  # zeros take 16 bits on the device, 4 in the files
    assert weights_of(replace(shape, stored_bytes=in_files + rest)) == whole
    assert weights_of(replace(shape, stored_bytes=in_files + rest + 1000)).extra == 1000
    assert weights_of(replace(shape, stored_bytes=in_files)).extra == 0


def test_int8_and_int4_cut_the_weights_to_a_half_and_a_quarter():
    """The article's words; embedding and head stay as they are, and scales come on top."""
    whole = weights_of(known_shape("llama-2-7b")).total
    assert 13.4e9 < whole < 13.6e9
    assert weights_of(known_shape("llama-2-7b"), "int8").total / whole == pytest.approx(0.52, abs=0.01)
    assert weights_of(known_shape("llama-2-7b"), "int4").total / whole == pytest.approx(0.29, abs=0.01)


def test_what_is_no_linear_stays_as_it_is():
    plain, quantized = weights_of(known_shape("mixtral-8x7b")), weights_of(known_shape("mixtral-8x7b"), "nf4")
    assert quantized.linears < plain.linears / 3
    assert (quantized.experts, quantized.embedding, quantized.head) == (plain.experts, plain.embedding, plain.head)


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(SizingError, match=r"quantize: there is no scheme 'bitsandbyte' \(did you mean bitsandbytes\?\)\. Allowed: bf16, "):
        scheme_named("bitsandbyte")

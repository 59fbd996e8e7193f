"""The roofline: it gives back what was measured, and scales to another card by what the card does."""

import json

import pytest

from docs.measured import PATH, measured
from sizing.adapters import adapter_bytes
from sizing.instances import GPUS
from sizing.models import known_shape
from sizing.throughput import MEASURED, distinct, efficiency_of, flops_per_token, step_bytes, throughput
from sizing.weights import weights_of

MISTRAL = known_shape(MEASURED["model"])


def test_the_measurements_are_those_of_the_saved_runs():
    assert json.loads(PATH.read_text()) == json.loads(measured()), "run `make docs`"


PLAIN = [row for row in MEASURED["decode"] if not row["num_adapters"]]


@pytest.mark.parametrize("row", PLAIN, ids=[f"{row['scheme']} {row['rows']}" for row in PLAIN])
def test_a_measured_step_comes_out_as_it_was_measured(row):
    """Prompt and output of the benchmark; the step without the prompts' time."""
    speed = throughput(
        MISTRAL, GPUS["H100"], rows=row["rows"], prompt_len=row["prompt_len"], output_len=row["num_new"], scheme=row["scheme"]
    )
    assert speed.step_ms == pytest.approx(row["step_ms"], rel=0.01) and not speed.is_projection


def test_a_card_is_as_fast_as_its_memory():
    asked = dict(rows=16, prompt_len=256, output_len=128)
    there, here = throughput(MISTRAL, GPUS["H100"], **asked), throughput(MISTRAL, GPUS["L4"], **asked)
    assert here.step_ms / there.step_ms == pytest.approx(3350 / 300) and here.is_projection and here.bound == "bandwidth"
    assert here.per_sequence * 16 == pytest.approx(here.tokens_per_s)


def test_fewer_bits_are_fewer_bytes():
    speeds = [throughput(MISTRAL, GPUS["L4"], rows=1, prompt_len=16, output_len=256, scheme=name) for name in ("bf16", "int8", "int4")]
    assert speeds[0].step_ms > 1.8 * speeds[1].step_ms > 1.8 * 1.7 * speeds[2].step_ms


def test_adapters_cost_their_bytes_and_their_launches():
    one = adapter_bytes(MISTRAL, 16, ["all-linear"])
    assert one == pytest.approx(84e6, rel=0.01)  # as measured: gpu-evidence says 84 MB
    speeds = [
        throughput(MISTRAL, GPUS["L4"], rows=64, prompt_len=16, output_len=256, num_adapters=count, bytes_of_adapter=one)
        for count in (0, 1, 25)
    ]
    assert speeds[0].adapters_ms == 0 < speeds[1].adapters_ms < speeds[2].adapters_ms


def test_what_a_step_reads():
    weights = weights_of(MISTRAL)
    read = step_bytes(MISTRAL, weights, rows=64, context=100, num_adapters=25, bytes_of_adapter=1000)
    assert read.weights == weights.total - weights.embedding and read.kv == 64 * 100 * 131072
    assert 22_000 < read.adapters < 25_000  # 64 rows that choose evenly leave few of 25 out


def test_a_window_and_experts_are_read_in_part():
    gemma = known_shape("gemma-2-9b")
    long, short = (step_bytes(gemma, weights_of(gemma), rows=1, context=n, num_adapters=0, bytes_of_adapter=0).kv for n in (8192, 4096))
    assert long == pytest.approx(1.5 * short)  # half of the layers see 4096 positions
    mixtral = known_shape("mixtral-8x7b")
    weights = weights_of(mixtral)
    one, many = (step_bytes(mixtral, weights, rows=n, context=0, num_adapters=0, bytes_of_adapter=0).weights for n in (1, 64))
    assert one == pytest.approx(weights.experts / 4 + weights.linears + weights.other + weights.head)
    assert many == pytest.approx(weights.total - weights.embedding, rel=1e-3)
    assert flops_per_token(mixtral) == pytest.approx(2 * 12.6e9, rel=0.02)


def test_adapters_that_a_step_meets():
    assert distinct(0, 8) == 0 and distinct(1, 8) == 1 and distinct(25, 1) == pytest.approx(1)
    assert 20 < distinct(25, 64) < 25 and distinct(1000, 64) < 64


def test_an_efficiency_lies_between_those_that_were_measured():
    found = efficiency_of("bf16")
    (first, low), (second, high), *_ = found.base
    assert found.base_at(first) == low and found.base_at(10**6) == found.base[-1][1]
    assert min(low, high) <= found.base_at((first + second) // 2) <= max(low, high)
    assert all(0 < share <= 1 for _, share in (*found.base, *found.adapters)) and 0 < found.prompts <= 1
    assert efficiency_of("nf4").scheme in ("nf4", "bf16")  # of what was not measured, bf16's

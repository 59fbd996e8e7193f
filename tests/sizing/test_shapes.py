"""What sizing/ works out from a config.json is what transformers builds: parameters, groups, keys and values, windows."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.kernels.grouped import GroupShape
from server.model.architectures import VERIFIED
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from sizing.architectures import FAMILIES
from sizing.errors import SizingError
from sizing.models import MODELS, known_models, known_shape, shape_of
from sizing.shape import ModelShape
from tests.server.engine.tiny_models import make_config, make_model


def test_every_served_architecture_has_a_shape():
    assert set(FAMILIES) == set(VERIFIED)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def columns(shape: ModelShape) -> list[tuple[int, tuple[int, ...]]]:
    """(in, outs) of every group, in the layers' order."""
    return [(group[0].in_features, tuple(linear.out_features for linear in group)) for group in shape.groups]


def columns_of(group: GroupShape) -> tuple[int, tuple[int, ...]]:
    return group.in_features, tuple(stop - start for start, stop in group.columns)


@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_a_shape_is_what_the_engine_finds(model_type):
    config = make_config(model_type)
    model = make_model(model_type, attention=ATTENTION_NAME)
    num_params = count(model)  # before the engine moves weights
    base = BaseModel(model)
    shape = shape_of(model_type, config.to_dict())
    assert shape.num_params == num_params
    assert (shape.hidden_size, shape.vocab_size, shape.is_tied) == (base.layout.hidden_size, base.layout.vocab_size, base.layout.tied_head)
    seen = [
        (each.num_heads, each.num_kv_heads, each.key_dim, each.value_dim, each.window, each.has_sinks) for each in base.attention_shapes
    ]
    assert [
        (a.num_heads, a.num_kv_heads, a.key_dim, a.value_dim, a.window, a.has_sinks) for a in (layer.attention for layer in shape.layers)
    ] == seen
    assert sorted(columns(shape)) == sorted(map(columns_of, base.group_shapes))
    assert shape.widest_out == max(group.out_features for group in base.group_shapes)
    names = {site.name.rpartition(".")[2] for site in base.layout.sites if site.kind == "linear"}
    assert {linear.name for group in shape.groups for linear in group} == names - {"lm_head", "embed_out"}


@pytest.mark.parametrize("name", sorted(known_models()))
def test_a_well_known_model_is_counted_right(name):
    """As transformers builds it from the same config, without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]["config"]))
    assert known_models()[name].num_params == count(model)


@pytest.mark.parametrize(
    ("name", "billions"),  # as published
    [("SmolLM2-135M-Instruct", 0.1345), ("meta-llama/Llama-2-7b-hf", 6.738), ("meta-llama/Llama-3.1-8B-Instruct", 8.030),
     ("mistral-7b-instruct-v0.3", 7.248), ("Qwen/Qwen2.5-7B", 7.616), ("Mixtral-8x7B-v0.1", 46.70), ("gemma-2-9b-it", 9.242)],
)  # fmt: skip
def test_a_well_known_model_is_found_by_what_people_call_it(name, billions):
    assert known_shape(name).num_params / 1e9 == pytest.approx(billions, rel=1e-3)


def test_what_the_cache_holds():
    assert known_shape("mistral-7b").kv_values_per_token * 16 * 2 == 2 << 20  # 2 MiB a block of 16 tokens
    assert known_shape("llama-2-7b").kv_values_per_token == 4 * known_shape("mistral-7b").kv_values_per_token


MISTRAL = MODELS["mistral-7b"]["config"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba2"}, "model mine: the shape of architecture 'mamba2' is not known. Known: cohere"),
        ({"model_type": None}, "model mine: its config.json has no model_type"),
        ({"intermediate_size": None}, "model mine: its config.json has no intermediate_size"),
        ({"hidden_size": "4096"}, "model mine: hidden_size in its config.json must be a whole number. Given: '4096'"),
        ({"num_attention_heads": 0}, "num_attention_heads in its config.json must be at least 1"),
        ({"quantization_config": {"quant_method": "quip"}}, "its checkpoint is quantized by 'quip', which is unknown. Known: bf16"),
    ],
)
def test_a_model_of_unknown_shape_is_refused_by_name(changes, said):
    with pytest.raises(SizingError) as caught:
        shape_of("mine", MISTRAL | changes)
    assert said in str(caught.value)


def test_a_model_that_nobody_knows_is_refused_with_what_to_do():
    with pytest.raises(SizingError, match=r"model acme/mistral-8b: its shape is not known: .*near it: mistral-7b.*no config.json"):
        known_shape("acme/mistral-8b")

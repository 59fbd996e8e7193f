"""What is refused before or while a base is loaded, by name; and what the probe finds out by itself."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from server.model import product
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from server.model.load import base_revision, load_base
from tests.server.engine.tiny_models import DEVICE, make_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return load_base(folder, torch.float32, CPU, **options)


def test_a_folder_loads(folder):
    base = load(folder)
    assert base.layout.model_type == "llama" and base.layout.num_layers == 3 and base.layout.dtype == "float32"
    assert base.revision == base_revision(folder)


def test_the_revision_names_the_weights(folder, tmp_path):
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    assert base_revision(folder) == base_revision(folder) != base_revision(tmp_path / "other")


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no config.json"):
        load(tmp_path)
    weights = next(folder.glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickled weights are refused"):
        load(folder)


def test_an_unverified_architecture_is_refused_unless_it_may_be_tried(tmp_path):
    config = AutoConfig.for_model("arcee", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'arcee' is not verified; --allow-unverified-architecture tries it"):
        load(tmp_path)
    assert load(tmp_path, allow_unverified_architecture=True).layout.model_type == "arcee"


def test_a_window_that_is_in_the_masks_alone_is_refused():
    """The masks never reach a paged cache: such a model would see more of the past than it was trained to."""
    model = make_model("llama", attention=ATTENTION_NAME)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding_window 8 but does not pass it"):
        BaseModel(model)
    model = make_model("gemma2", attention=ATTENTION_NAME)
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(ValueError, match="layer 0: attention of kind 'full_attention' called with window 9"):
        BaseModel(model)


def groups(model):
    return [group.names for group in BaseModel(model).groups]


def test_siblings_are_those_that_really_get_the_same_tensor():
    found = groups(make_model("llama", attention=ATTENTION_NAME))
    prefix = "model.layers.0."
    assert found[0] == [prefix + f"self_attn.{name}_proj" for name in "qkv"]
    assert found[1] == [prefix + "self_attn.o_proj"] and found[2] == [prefix + "mlp.gate_proj", prefix + "mlp.up_proj"]
    assert found[-1] == ["lm_head"]

    class Doubling(nn.Linear):
        """A key projection that is not one product."""

        def forward(self, x):
            return super().forward(x) * 2

    model = make_model("llama", attention=ATTENTION_NAME)
    old = model.model.layers[0].self_attn.k_proj
    special = Doubling(old.in_features, old.out_features, bias=False)
    special.weight = old.weight
    model.model.layers[0].self_attn.k_proj = special
    assert groups(model)[:3] == [[prefix + f"self_attn.{name}_proj"] for name in "qkv"]


def test_experts_are_no_sites_and_routers_can_be_replaced():
    layout = BaseModel(make_model("qwen3_moe", attention=ATTENTION_NAME)).layout
    assert not [site.name for site in layout.sites if "experts" in site.name]
    replaceable = {module.name for module in layout.modules if module.replaceable}
    assert {"model.layers.0.mlp.gate", "model.layers.0.input_layernorm", "model.norm"} <= replaceable
    assert "model.layers.0.mlp.experts" not in replaceable and "model.layers.0" not in replaceable


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
def test_products_hold_no_weight_twice_and_know_it(model_type, blocked, monkeypatch):
    if blocked and DEVICE.type != "cpu":
        pytest.skip("blocked products are the CPU's")
    monkeypatch.setattr(product, "_can_block", lambda weight: blocked)
    weights = {name: p.clone() for name, p in make_model(model_type).named_parameters()}
    model = make_model(model_type, attention=ATTENTION_NAME)
    base = BaseModel(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for group in base.groups:
        for index, (name, module) in enumerate(zip(group.names, group.modules, strict=True)):
            expected = weights.get(f"{name}.weight", module.weight)  # a tied head is named once, as the embedding
            transposed = isinstance(module, Conv1D)
            assert torch.equal(group.product.weight(index), expected.T if transposed else expected), name
            if module.weight is not base.embedding_module.weight and blocked:
                assert module.weight.untyped_storage().nbytes() <= 4 and module.weight.shape == expected.shape
    if not blocked and model_type == "llama":
        attention = base.model.model.layers[0].self_attn
        assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()


def test_blocked_products_are_right(monkeypatch):
    torch.manual_seed(0)
    linears = [nn.Linear(40, out) for out in (24, 7)]
    expected = [(linear.weight.double(), linear.bias.double()) for linear in linears]
    one = product.Product(linears)
    for rows in (1, 3, 70):
        x = torch.randn(1, rows, 40)
        exact = torch.cat([x.double() @ weight.T + bias for weight, bias in expected], -1)
        assert torch.allclose(one(x).double(), exact, atol=1e-5)
    with pytest.raises(ValueError, match="plain linears"):
        product.Product([nn.Linear(2, 2), nn.Identity()])

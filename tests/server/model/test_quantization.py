"""The contract of every quantization scheme: it loads, serves the base and adapters in one batch, and is what its weights say, plus LoRA.

Each scheme is loaded from a checkpoint of its own format, or rounds a plain one while loading, or both. The oracle is transformers' model
with the weights that the codes stand for, and PEFT on it: logits within 1e-4 in float32.
"""

import json
import random
import shutil
import typing

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from server.engine.build import assemble
from server.engine.core import run_until_idle
from server.kernels.quantized import dequantize
from server.model.load import load_base
from server.model.quantization import SCHEMES, choose_quantization, hqq, int4
from server.model.quantization.linear import QuantizedLinear
from server.model.quantization.loading import quantize_model
from server.model.quantization.scheme import grouped
from server.settings import Settings
from server.types import EngineOptions, EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.tiny_models import VOCAB, make_model
from tests.server.model.checkpoints import FORMATS, GROUP, write_checkpoint

CPU = torch.device("cpu")
SHAPE = dict(hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=2)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {},
    "all-linear": dict(target_modules=ALL, r=5),
    "dora": dict(target_modules=ALL, use_dora=True),
    "saved": dict(modules_to_save=["norm", "lm_head"]),
}
# Relative error of the weights that a scheme may make of normal ones while loading.
ERRORS = {"int8": 0.01, "int8-bnb": 0.01, "fp8": 0.035, "int4": 0.098, "hqq": 0.11, "nf4": 0.11}
ON_THE_FLY = sorted(name for name, scheme in SCHEMES.items() if scheme.quantize)
CASES = [(name, None) for name in ON_THE_FLY] + [(scheme, form) for form, (scheme, *_) in FORMATS.items()]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    make_model("llama", **SHAPE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, "llama", seed=i, model_changes=SHAPE, **kind) for i, (name, kind) in enumerate(KINDS.items())}


def load(folder, **options):
    return load_base(folder, torch.float32, CPU, **options)


def prepare(plain, tmp_path, scheme, form, **changes):
    """(folder, what to ask for, the weights that its linears have then)."""
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    if form is not None:
        return folder, None, write_checkpoint(folder, form, **changes)
    weights = make_model("llama", **SHAPE).state_dict()
    quantize = SCHEMES[scheme].quantize
    return folder, scheme, {name: dequantize(quantize(weight)) for name, weight in weights.items() if name.endswith("_proj.weight")}


def serve_and_compare(base, dense, adapters, tmp_path, **options):
    """The base and every adapter in one batch, each row against transformers and PEFT on the dense weights."""
    core = assemble(base, EngineOptions(**{
        "model_dir": "", "block_size": 4, "num_blocks": 96, "max_batch_tokens": 32, "max_batch_size": 8, "max_sequence_len": 64,
        "adapter_device_bytes": 1 << 24, "adapter_host_bytes": 1 << 26, **options,
    }))  # fmt: skip
    rng = random.Random(0)
    params = SamplingParams(max_new_tokens=3, num_logprobs=VOCAB, raw_logprobs=True)
    prompts = {name: [rng.randrange(3, VOCAB) for _ in range(rng.randrange(5, 12))] for name in ("base", *adapters)}
    for name, prompt in prompts.items():
        ref = None if name == "base" else pack(adapters[name], base.layout, tmp_path / f"{name}.pack")
        core.add(EngineRequest(name, prompt, params, ref))
    outputs = run_until_idle(core)
    for name, prompt in prompts.items():
        mine = [output for output in outputs if output.request_id == name]
        assert mine[-1].finish_reason == "length", (name, mine[-1].error)
        reference = make_model("llama", **SHAPE)
        assert not reference.load_state_dict(dense, strict=False).unexpected_keys
        reference = reference if name == "base" else PeftModel.from_pretrained(reference, adapters[name]).eval()
        tokens = [token for output in mine for token in output.token_ids]
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        got = torch.tensor([[value for _, value in sorted(output.logprobs[0].top)] for output in mine])
        assert torch.allclose(got, expected, atol=1e-4), (name, (got - expected).abs().max())


@pytest.mark.parametrize("scheme, form", CASES, ids=[f"{scheme} {form or 'while loading'}" for scheme, form in CASES])
def test_every_scheme_serves_its_own_weights_and_adapters(plain, adapters, tmp_path, scheme, form):
    folder, asked, dense = prepare(plain, tmp_path, scheme, form)
    base = load(folder, quantize=asked)
    assert base.revision.endswith(f"-{scheme}")
    linears = [name for name, module in base.model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(f"{name}.weight" for name in linears) == sorted(dense) and len(linears) == 14
    serve_and_compare(base, dense, adapters, tmp_path)
    assert all(module.quantized is None for module in base.model.modules() if isinstance(module, QuantizedLinear))  # one product has it


def test_every_scheme_has_a_case():
    assert {scheme for scheme, _ in CASES} == set(SCHEMES)
    assert all(scheme.quantize or scheme.reader for scheme in SCHEMES.values())
    assert all((scheme.reader is None) == (scheme.method is None) for scheme in SCHEMES.values())


def test_the_settings_know_every_scheme():
    assert set(typing.get_args(typing.get_args(Settings.model_fields["quantize"].annotation)[0])) == set(SCHEMES)
    assert {name for name, scheme in SCHEMES.items() if scheme.quantize is None} == {
        "awq",
        "gptq",
    }  # what Settings lets --quantize-head with


@pytest.mark.parametrize("name", ON_THE_FLY)
def test_what_is_rounded_stays_near(name):
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(96, 256)
    quantized = SCHEMES[name].quantize(weight)
    assert (dequantize(quantized) - weight).norm() / weight.norm() < ERRORS[name]
    assert 8 * quantized.num_bytes / weight.numel() < SCHEMES[name].bits + 0.6  # a scale of 32 bits for 256 inputs of 8 bits is not small
    assert torch.equal(dequantize(SCHEMES[name].quantize(torch.zeros(16, 256))), torch.zeros(16, 256))
    for_half = SCHEMES[name].quantize(weight.bfloat16())
    assert (dequantize(for_half) - weight).norm() / weight.norm() < ERRORS[name] + 0.003


def test_ranges_of_4_bits_are_those_with_the_smallest_error(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(48, 512) + torch.randn(48, 1)  # ends of all kinds: of one sign too
    values = grouped(weight, 128)

    def errors_of(quantized):
        return (grouped(dequantize(quantized), 128) - values).pow(4).sum(2)

    found = int4.quantize(weight)
    monkeypatch.setitem(int4._BLOCK, "cpu", 3 * 512)
    for in_parts, whole in zip((found.data, found.scales, found.zeros), _tensors(int4.quantize(weight)), strict=True):
        assert torch.equal(in_parts, whole)
    errors = []
    for least_factor in (1.0, 0.9, 0.8, 0.7):  # ranges that the search may try, and others between them
        for most_factor in (1.0, 0.9, 0.8, 0.7):
            least, most = least_factor * values.amin(2).clamp(max=0), most_factor * values.amax(2).clamp(min=0)
            scales = ((most - least) / 15).half().float()[..., None]
            zeros = (-least[..., None] / scales).round().clamp(0, 15)
            errors.append((((values / scales + zeros).round().clamp(0, 15) - zeros) * scales - values).pow(4).sum(2))
    assert (errors_of(found) <= errors[0] * (1 + 1e-3)).all()  # no group is worse than with its whole range
    assert errors_of(found).sum() < 0.9 * errors[0].sum()
    assert errors_of(found).sum() < 1.02 * torch.stack(errors).amin(0).sum()


def _tensors(quantized):
    return quantized.data, quantized.scales, quantized.zeros


def test_fitted_zeros_are_nearer_by_what_they_are_fitted_for():
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * (1 + 5 * (torch.rand(64, 256) > 0.98))  # a few that stand out
    fitted = SCHEMES["hqq"].quantize(weight)
    values = grouped(weight, hqq.GROUP)
    least, most = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    step, zero = (most - least) / 15, (-15 * least / (most - least)).round()
    rounded = ((values / step + zero).round().clamp(0, 15) - zero) * step
    assert (dequantize(fitted) - weight).abs().mean() < (rounded.view(weight.shape) - weight).abs().mean()


def test_siblings_are_one_product_unless_their_inputs_are_in_different_orders(plain, tmp_path):
    for form, pieces in (("gptq act-order", 1), ("gptq_v2 apart", 3)):
        folder, _, dense = prepare(plain, tmp_path / form, "gptq", form)
        group = load(folder).groups[0]
        assert len(group.product._quantized.weights) == pieces and group.names[0].endswith("q_proj")
        assert group.product.weight_of_all.shape[0] == 128 == group.shape.out_features
        assert torch.allclose(group.product.weight(1), dense["model.layers.0.self_attn.k_proj.weight"], atol=1e-6)


def test_the_layout_is_that_of_the_base_as_it_was(plain):
    assert load(plain, quantize="int4").layout == load(plain).layout  # so a pack made for one serves the other


def test_what_a_checkpoint_left_alone_stays(plain, adapters, tmp_path):
    folder, _, dense = prepare(plain, tmp_path, "awq", "awq", skip=("lm_head", "layers.1", "down_proj"))
    base = load(folder)
    assert {name for name, module in base.model.named_modules() if isinstance(module, QuantizedLinear)} == {
        f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                              "mlp.gate_proj", "mlp.up_proj")
    }  # fmt: skip
    serve_and_compare(base, dense, {"plain": adapters["plain"]}, tmp_path)


def test_the_head_is_quantized_where_that_is_asked_for_or_found(plain, adapters, tmp_path):
    base = load(plain, quantize="int8", quantize_head=True)
    weights = make_model("llama", **SHAPE).state_dict()
    dense = {
        name: dequantize(SCHEMES["int8"].quantize(weight))
        for name, weight in weights.items()
        if name.endswith("_proj.weight") or "head" in name
    }
    assert isinstance(base.head_module, QuantizedLinear) and not base.layout.tied_head
    serve_and_compare(base, dense, {name: adapters[name] for name in ("plain", "saved")}, tmp_path)


def test_the_gpu_s_path_without_a_gpu(plain, adapters, tmp_path):
    """The arena, the adapters' kernels in Triton's interpreter, and the products as opaque operators."""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder, asked, dense = prepare(plain, tmp_path, "int4", None)
    chosen = {name: adapters[name] for name in ("plain", "dora")}
    serve_and_compare(load(folder, quantize=asked), dense, chosen, tmp_path, kernels="triton", compile_layers=False)


def test_a_model_that_is_there_is_quantized_in_place(plain, tmp_path):
    model = make_model("llama", **SHAPE)
    quantize_model(model, choose_quantization("int4", None))
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    expected = dequantize(SCHEMES["int4"].quantize(make_model("llama", **SHAPE).model.layers[1].mlp.down_proj.weight.data))
    assert torch.equal(dequantize(model.model.layers[1].mlp.down_proj.quantized), expected)


def test_what_is_asked_for_and_what_is_there_must_agree(plain, tmp_path):
    with pytest.raises(ValueError, match="quantize 'int5' is not known; allowed: fp8, int8, int4, hqq, nf4, int8-bnb, awq, gptq"):
        load(plain, quantize="int5")
    with pytest.raises(
        ValueError, match="quantize 'awq' needs a checkpoint that was made so; this one is not quantized. While loading: fp8"
    ):
        load(plain, quantize="awq")
    folder, _, _ = prepare(plain, tmp_path, "awq", "awq")
    with pytest.raises(ValueError, match="quantize 'int8', but the checkpoint is quantized already, as 'awq'"):
        load(folder, quantize="int8")
    assert load(folder, quantize="awq").revision.endswith("-awq")


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("awq", {"bits": 8}, "quantization_config.bits is 8; allowed: 4"),
        ("awq", {"version": "gemv"}, "quantization_config.version is 'gemv'; allowed: 'gemm'"),
        ("awq", {"zero_point": False}, "quantization_config.zero_point is False; allowed: True"),
        ("awq", {"group_size": 48}, "model.layers.0.self_attn.q_proj: 64 inputs cannot be in groups of 48: allowed are 16, 32, 64"),
        ("awq", {"group_size": 64}, r"q_proj: qzeros has shape \[2, 8\], expected \[1, 8\]"),
        ("awq", {"quant_method": "exl2"}, "quant_method is 'exl2', which is not read; those that are: awq, bitsandbytes, gptq"),
        ("gptq", {"bits": 3}, "quantization_config.bits is 3; allowed: 4"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; allowed: 'gptq', 'gptq_v2'"),
        ("gptq", {"dynamic": {"-:lm_head": {}}}, r"quantization_config.dynamic \(bits that differ by module\) is not supported"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'; allowed: 'nf4'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(plain, tmp_path, form, change, message):
    folder, _, _ = prepare(plain, tmp_path, None, form)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_inputs_that_do_not_fit_are_refused_by_name(tmp_path):
    make_model("llama", hidden_size=40).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: 40 inputs cannot be in groups of 32"):
        load(tmp_path / "odd", quantize="int4")
    with pytest.raises(ValueError, match="q_proj: 40 inputs cannot be in groups of 64"):
        load(tmp_path / "odd", quantize="hqq")
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="nothing can be quantized as 'int4': the model has no linear layers of its own"):
        load(tmp_path / "gpt2", quantize="int4")


def test_groups_of_activation_order_must_be_whole():
    reader = SCHEMES["gptq"].reader(FORMATS["gptq act-order"][2])
    tensors, _ = FORMATS["gptq act-order"][1](16, 64, torch.Generator().manual_seed(0))
    tensors["g_idx"][0] = 1 - tensors["g_idx"][0]
    with pytest.raises(ValueError, match=f"g_idx does not put {GROUP} inputs in every group"):
        reader.read(tensors, 64, 16)


def test_a_missing_tensor_is_named(plain, tmp_path):
    folder, _, _ = prepare(plain, tmp_path, "awq", "awq")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj: the checkpoint has no tensor 'model.layers.1.mlp.up_proj.scales'"):
        load(folder)
    del tensors["model.layers.1.mlp.up_proj.qweight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint has no tensor 'model.layers.1.mlp.up_proj.weight'"):
        load(folder)

"""Quantized bases in the whole engine on a GPU: FlashInfer, compiled layers, captured steps; the base and adapters in one batch."""

import random

import pytest
import torch
from peft import PeftModel

from server.engine.build import assemble
from server.engine.core import run_until_idle
from server.kernels.quantized import dequantize
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from server.model.quantization import SCHEMES, choose_quantization
from server.model.quantization.loading import quantize_model
from server.types import EngineOptions, EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.tiny_models import DEVICE, VOCAB, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: MANYLORA_TEST_DEVICE=cuda"),
    pytest.mark.filterwarnings("ignore"),
]
SHAPE = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=384)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {"plain": {}, "all-linear": dict(target_modules=ALL, r=5), "dora": dict(target_modules=ALL, use_dora=True)}
ON_THE_FLY = sorted(name for name, scheme in SCHEMES.items() if scheme.quantize)


@pytest.mark.parametrize("scheme", ON_THE_FLY)
def test_a_mixed_batch_is_as_near_to_the_truth_as_the_dense_weights_in_bfloat16(scheme, tmp_path):
    pytest.importorskip("flashinfer")
    model = make_model("llama", attention=ATTENTION_NAME, **SHAPE).bfloat16()
    dense = {
        name: dequantize(SCHEMES[scheme].quantize(weight)) for name, weight in model.state_dict().items() if name.endswith("_proj.weight")
    }
    quantize_model(model, choose_quantization(scheme, None))
    base = BaseModel(model)
    options = EngineOptions(model_dir="", num_blocks=256, max_batch_size=80, max_batch_tokens=256, max_sequence_len=128,
                            adapter_device_bytes=1 << 24, adapter_host_bytes=1 << 28)  # fmt: skip
    core = assemble(base, options)
    assert core.runner.graphs is not None and base.attention.name == "flashinfer"
    rng, params = random.Random(0), SamplingParams(max_new_tokens=4, num_logprobs=VOCAB, raw_logprobs=True)
    refs = {"base": None}
    for seed, (name, config) in enumerate(KINDS.items()):
        folder = save_adapter(tmp_path / name, "llama", seed=seed, model_changes=SHAPE, **config)
        refs[name] = pack(folder, base.layout, tmp_path / f"{name}.pack")
    for crowd in (1, 10):  # decode steps of 4 and of 40 rows, prefill of as many at once: every way to multiply
        prompts = {f"{name} {i}": [rng.randrange(3, VOCAB) for _ in range(rng.randrange(6, 30))] for name in refs for i in range(crowd)}
        for name, prompt in prompts.items():
            core.add(EngineRequest(name, prompt, params, refs[name.split()[0]]))
        outputs = run_until_idle(core, timeout_s=300)
        assert [o.error for o in outputs if o.error] == []
        for name in refs:
            mine = [o for o in outputs if o.request_id == f"{name} 0"]
            tokens = [token for output in mine for token in output.token_ids]
            whole = torch.tensor([prompts[f"{name} 0"] + tokens[:-1]], device=DEVICE)
            exact, half, rounded = (
                _logprobs(dense, dtype, tmp_path / name if name != "base" else None, whole, to_e4m3=to_e4m3)[-len(mine) :]
                for dtype, to_e4m3 in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
            )
            got = torch.tensor([[value for _, value in sorted(output.logprobs[0].top)] for output in mine])
            if scheme == "fp8":  # What is multiplied has 3 bits of mantissa: a hair's difference in one layer is a large one in the next.
                assert _rms(got - exact) < 2 * _rms(rounded - exact), (name, crowd)
            else:
                assert (got - exact).abs().max() < 3 * (half - exact).abs().max() + 0.05, (name, crowd)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def _logprobs(dense: dict[str, torch.Tensor], dtype: torch.dtype, adapter, whole: torch.Tensor, *, to_e4m3: bool) -> torch.Tensor:
    """Of the dense weights; `to_e4m3`: what the base's products read has 3 bits of mantissa and a scale for each row, as fp8's have."""
    reference = make_model("llama", **SHAPE)
    reference.load_state_dict(dense, strict=False)
    for name, module in reference.named_modules() if to_e4m3 else ():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda module, args: (_round(args[0]),))
    reference = reference if adapter is None else PeftModel.from_pretrained(reference, adapter).eval().to(DEVICE)
    with torch.inference_mode():
        return reference.to(dtype)(whole).logits[0].float().log_softmax(-1).cpu()


def _round(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

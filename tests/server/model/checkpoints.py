"""Quantized checkpoints in the formats of those who invented them, written from random codes: what real folders hold, at a tiny size.

Written from the formats' own packing loops, not from our reader; each also says what its weights are.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from server.kernels.quantized import NF4

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words_of(codes: torch.Tensor, order: list[int]) -> torch.Tensor:
    """codes [rows, columns] -> int32 [rows, columns / 8]: nibble i of a word is column order[i] of its eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for i, place in enumerate(order):
            words[:, column] |= codes[:, 8 * column + place].long() << 4 * i
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _four_bits(n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [out, in], zeros [out, groups] from 1 to 16, scales [out, groups]."""
    codes = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(1, 17, (n, k // GROUP), generator=generator)
    return codes, zeros, (0.01 + 0.03 * torch.rand(n, k // GROUP, generator=generator)).half()


def awq(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, zeros, scales = _four_bits(n, k, generator)
    zeros = zeros - 1  # 0 to 15
    tensors = {"qweight": words_of(codes.T, AWQ_ORDER), "qzeros": words_of(zeros.T, AWQ_ORDER), "scales": scales.T}
    of = torch.arange(k) // GROUP
    return tensors, (codes - zeros[:, of]) * scales.float()[:, of]


def _gptq(n: int, k: int, generator: torch.Generator, added: int, of: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, zeros, scales = _four_bits(n, k, generator)
    zeros = zeros - 1 + added
    natural = list(range(8))
    tensors = {"qweight": words_of(codes, natural).T, "qzeros": words_of((zeros - added).T, natural), "scales": scales.T}
    return tensors | {"g_idx": of.to(torch.int32)}, (codes - zeros[:, of]) * scales.float()[:, of]


def gptq(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return _gptq(n, k, generator, 1, torch.arange(k) // GROUP)


def gptq_act_order(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The order follows from the inputs alone, as siblings' does."""
    return _gptq(n, k, generator, 1, (torch.arange(k) // GROUP)[torch.randperm(k, generator=torch.Generator().manual_seed(k))])


def gptq_v2_apart(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Format 2, and every linear in an order of its own: siblings cannot be one product."""
    return _gptq(n, k, generator, 0, (torch.arange(k) // GROUP)[torch.randperm(k, generator=generator)])


def _nf4(n: int, k: int, generator: torch.Generator, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), generator=generator)
    flat, num_blocks = codes.view(-1), n * k // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [n, k]}
    tensors = {"weight": (flat[::2] << 4 | flat[1::2]).to(torch.uint8).view(-1, 1), "weight.quant_map": torch.tensor(NF4)}
    if nested:
        map_, outer = torch.linspace(-1, 1, 256), 0.05 * torch.rand(-(-num_blocks // 256), generator=generator)
        inner = torch.randint(0, 256, (num_blocks,), generator=generator)
        scales = map_[inner] * outer.repeat_interleave(256)[:num_blocks] + 0.2
        state |= {"nested_blocksize": 256, "nested_offset": 0.2, "nested_dtype": "float32"}
        tensors |= {"weight.absmax": inner.to(torch.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": map_}
    else:
        scales = 0.1 + 0.2 * torch.rand(num_blocks, generator=generator)
        tensors["weight.absmax"] = scales
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    dense = torch.tensor(NF4)[flat].view(-1, 64) * scales.half().float()[:, None]
    return tensors, dense.view(n, k)


def nf4(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return _nf4(n, k, generator, nested=False)


def nf4_nested(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return _nf4(n, k, generator, nested=True)


def int8_bnb(n: int, k: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    most = 0.2 + 0.3 * torch.rand(n, generator=generator)
    tensors = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (most / 127)[:, None]


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True, "modules_to_not_convert": ["lm_head"]}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_BNB = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# Name -> (scheme, writer of one linear, quantization_config)
FORMATS = {
    "awq": ("awq", awq, _AWQ),
    "gptq": ("gptq", gptq, _GPTQ),
    "gptq act-order": ("gptq", gptq_act_order, _GPTQ | {"desc_act": True}),
    "gptq_v2 apart": ("gptq", gptq_v2_apart, _GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"}),
    "nf4": ("nf4", nf4, _BNB),
    "nf4 nested": ("nf4", nf4_nested, _BNB | {"bnb_4bit_use_double_quant": True}),
    "int8-bnb": ("int8-bnb", int8_bnb, _BNB | {"load_in_8bit": True, "load_in_4bit": False}),
}


def write_checkpoint(folder: Path, name: str, *, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, torch.Tensor]:
    """Quantize the plain checkpoint in `folder` in place, all linears but those of `skip`; what their weights are now, by name."""
    _, write, quantization_config = FORMATS[name]
    (file,) = folder.glob("*.safetensors")
    tensors, generator, dense = load_file(file), torch.Generator().manual_seed(5), {}
    for key in [key for key in tensors if key.endswith("_proj.weight") or key == "lm_head.weight"]:
        module = key.removesuffix(".weight")
        if any(part in module for part in skip):
            continue
        weight = tensors.pop(key)
        made, dense[key] = write(*weight.shape, generator)
        tensors |= {f"{module}.{name}": tensor.contiguous() for name, tensor in made.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    return dense

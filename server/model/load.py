"""From a folder of safetensors to a BaseModel: architecture checked, dtype chosen, weights read.

Owns the refusals that come before any weight is read. Local folders only: the API process brings what is remote.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from server.model.architectures import VERIFIED
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from server.model.quantization import Quantization, choose_quantization
from server.model.quantization.loading import LoadConfig, Tensors, register


def load_base(
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    allow_unverified_architecture: bool = False,
    quantize: str | None = None,
    quantize_head: bool = False,
) -> BaseModel:
    """The base model of a folder in Hugging Face's layout. `quantize`: one of quantization.SCHEMES; a checkpoint that is quantized already
    says so itself. ValueError names what is wrong with it."""
    config_file = model_dir / "config.json"
    if not config_file.is_file():
        raise ValueError(f"model-id '{model_dir}': there is no config.json")
    if not list(model_dir.glob("*.safetensors")):
        raise ValueError(f"model-id '{model_dir}': there is no *.safetensors (pickled weights are refused)")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    if config.model_type not in VERIFIED and not allow_unverified_architecture:
        raise ValueError(
            f"architecture '{config.model_type}' is not verified; --allow-unverified-architecture tries it. "
            f"Verified: {', '.join(sorted(VERIFIED))}"
        )
    quantization = choose_quantization(quantize, _quantization_config(config), head=quantize_head)
    # With a device map each tensor goes from the mapped file straight to the GPU: a g6.xlarge has no room for a copy of the model.
    model, info = AutoModelForCausalLM.from_pretrained(
        model_dir,
        config=config,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **({} if device.type == "cpu" else {"device_map": {"": device}}),
        **_load_quantized(quantization, config, model_dir),
    )
    if quantization is not None and info["missing_keys"]:
        raise ValueError(f"model-id '{model_dir}': the checkpoint has no tensor '{sorted(info['missing_keys'])[0]}'")
    revision = base_revision(model_dir)
    return BaseModel(model, revision=revision if quantization is None else f"{revision}-{quantization.scheme.name}")


def _quantization_config(config: PretrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _load_quantized(quantization: Quantization | None, config: PretrainedConfig, model_dir: Path) -> dict[str, Any]:
    """Arguments of from_pretrained that put our linears in place of transformers' own quantizer's."""
    if quantization is None:
        return {}
    register()
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return {"quantization_config": LoadConfig(quantization, Tensors(model_dir))}


def base_revision(model_dir: Path) -> str:
    """Names the base's weights: its config, and each weight file's name, size and header (not its gigabytes)."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for file in sorted(model_dir.glob("*.safetensors")):
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(json.dumps([file.name, file.stat().st_size]).encode())
            digest.update(stream.read(min(header_bytes, 1 << 20)))
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]

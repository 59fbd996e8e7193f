"""From a folder of safetensors to a BaseModel: architecture checked, dtype chosen, weights read.

Owns the refusals that come before any weight is read. Local folders only: the API process brings what is remote.
"""

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.model.architectures import VERIFIED
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel


def load_base(model_dir: Path, dtype: torch.dtype, device: torch.device, *, allow_unverified_architecture: bool = False) -> BaseModel:
    """The base model of a folder in Hugging Face's layout. ValueError names what is wrong with it."""
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
    # With a device map each tensor goes from the mapped file straight to the GPU: a g6.xlarge has no room for a copy of the model.
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        config=config,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        **({} if device.type == "cpu" else {"device_map": {"": device}}),
    )
    return BaseModel(model, revision=base_revision(model_dir))


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

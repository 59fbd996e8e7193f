"""PEFT as the oracle: adapters made, saved and run by PEFT on the same weights that the engine serves."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from server.adapters.pack import write_pack
from server.types import AdapterRef, BaseLayout
from tests.server.engine.tiny_models import DEVICE, make_model


def save_adapter(folder: Path, model_type: str, *, seed: int = 1, model_changes: dict | None = None, resize: int = 0, **config) -> Path:
    """Have PEFT make and save an adapter on a fresh copy of the base, every trainable parameter of it random."""
    base = make_model(model_type, **(model_changes or {}))
    if resize:
        base.resize_token_embeddings(base.config.vocab_size + resize, mean_resizing=False)
    settings = dict(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, LoraConfig(**{**settings, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * noise.abs())
                elif "lora_" in name:
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.add_(0.2 * noise)
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path, model_type: str, *, model_changes: dict | None = None, resize: int = 0) -> torch.nn.Module:
    """The base with the saved adapter, as PEFT loads it."""
    base = make_model(model_type, **(model_changes or {}))
    if resize:
        base.resize_token_embeddings(base.config.vocab_size + resize, mean_resizing=False)
    return PeftModel.from_pretrained(base, folder).eval().to(DEVICE)


def pack(folder: Path, layout: BaseLayout, out: Path) -> AdapterRef:
    """The folder as the engine takes it."""
    adapter_hash = f"hash-of-{folder.name}"
    write_pack(folder, layout, adapter_hash, out)
    return AdapterRef(adapter_hash, str(out), folder.name)

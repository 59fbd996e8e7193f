"""The engine on a base with random weights, made on the device: as `load_base`, but nothing is read.

`python -m benchmarks.gpu.random_base` is the engine process of a server (in place of `python -m server.engine`); `install` does the same
in this process. Only the loading is replaced: all else of the engine is the product's.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine import build
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from server.model.quantization import choose_quantization
from server.model.quantization.loading import quantize_model

STD = 0.02


@torch.no_grad()
def random_base(
    model_dir: Path, dtype: torch.dtype, device: torch.device, *, quantize: str | None = None, quantize_head: bool = False, **_: Any
) -> BaseModel:
    """A BaseModel of the folder's config, quantized where it is. The same seed gives the same weights, so packs made for one process serve
    the next."""
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, STD)
    if (quantization := choose_quantization(quantize, None, head=quantize_head)) is not None:
        quantize_model(model, quantization)
    return BaseModel(model, revision="random")


def install() -> None:
    """From now on engines of this process get random weights. AttributeError if server.engine.build does not load by that name any more."""
    if not hasattr(build, "load_base"):
        raise AttributeError("server.engine.build has no load_base; benchmarks.gpu.random_base must follow")
    build.load_base = random_base  # type: ignore[assignment]


if __name__ == "__main__":
    from server.engine.process import main

    install()
    sys.exit(main(os.environ))

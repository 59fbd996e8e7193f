"""What a scheme's rounding does to the embedded model: perplexity of a text that comes with Python, on a CPU in float32.

The text is `pydoc_data.topics`, the language reference that Python's `help()` shows, its topics one after the other, in windows of 512
tokens. The weights are what a scheme's codes stand for; of fp8 also with each row of activations rounded to e4m3, as in products of
many rows. Called by benchmarks.gpu_quant.
"""

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.rows import Row, append_row, installed
from server.kernels.quantized import dequantize
from server.model.quantization import SCHEMES

WINDOW = 512
_MOST = torch.finfo(torch.float8_e4m3fn).max


def measure_perplexity(out: Path, num_tokens: int) -> bool:
    """A row for the model as it is, and one a scheme."""
    from examples.embedded_model import DEFAULT_DIR, ensure_model

    ensure_model(DEFAULT_DIR, progress=False)
    windows = _windows(DEFAULT_DIR, num_tokens)
    common: Row = {
        "part": "perplexity", "model": "SmolLM2-135M-Instruct", "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "num_tokens": windows.numel(), "window": WINDOW, "versions": installed(),
    }  # fmt: skip
    base = None
    for scheme in ("as it is", *(name for name, found in SCHEMES.items() if found.quantize), "fp8 both"):
        started_at = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(DEFAULT_DIR, dtype=torch.float32, local_files_only=True).eval()
        error = 0.0 if scheme == "as it is" else _round(model, scheme.partition(" ")[0])
        with _rounded_activations(model) if scheme == "fp8 both" else _nothing():
            perplexity = _perplexity(model, windows)
        base = base or perplexity
        append_row(out, common | {
            "scheme": scheme, "perplexity": round(perplexity, 4), "drift": round(perplexity / base - 1, 5), "weight_error": round(error, 5),
        })  # fmt: skip
        print(f"{scheme}: {perplexity:.3f} ({perplexity / base - 1:+.2%}) in {time.monotonic() - started_at:.0f} s", flush=True)
    return True


def _windows(model_dir: Path, num_tokens: int) -> torch.Tensor:
    """The text's first tokens: int64 [windows, WINDOW]."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)(text[: 8 * num_tokens]).input_ids
    count = min(num_tokens, len(ids)) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.inference_mode()
def _perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def _round(model: nn.Module, scheme: str) -> float:
    """Every linear but the head as the scheme has it; the relative error of all their weights."""
    quantize, wrong, whole = SCHEMES[scheme].quantize, 0.0, 0.0
    assert quantize is not None
    for module in _linears(model):
        rounded = dequantize(quantize(module.weight.data))
        wrong += float((rounded - module.weight).square().sum())
        whole += float(module.weight.square().sum())
        module.weight.data = rounded
    return math.sqrt(wrong / whole)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()]


@contextmanager
def _rounded_activations(model: nn.Module) -> Iterator[None]:
    def round_rows(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        scale = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / _MOST
        return ((args[0] / scale).to(torch.float8_e4m3fn).float() * scale,)

    hooks = [module.register_forward_pre_hook(round_rows) for module in _linears(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield

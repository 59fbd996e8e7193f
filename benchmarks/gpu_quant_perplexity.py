"""What a scheme's rounding does to the embedded model: perplexity of a text that comes with Python, on a CPU in float32.

The text is `pydoc_data.topics`, the language reference that Python's `help()` shows, its topics one after the other, in windows of 512
tokens. The weights are what a scheme's codes stand for; of fp8 also with each row of activations rounded to e4m3, as in products of
many rows. With the weights as they are, also what keys and values in fewer bits do (`measure_kv`): rounded as the cache rounds them, on
their way into the attention. Called by benchmarks.gpu_quant.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.gpu.rows import Row, append_row, installed, stamp
from server.kernels.quantized import dequantize
from server.model import kv_dtype
from server.model.quantization import SCHEMES

WINDOW = 512
_MOST = torch.finfo(torch.float8_e4m3fn).max


def measure_perplexity(out: Path, num_tokens: int, names: Sequence[str] = ()) -> bool:
    """A row for the model as it is, and one a scheme; `names`: of these alone."""
    model_dir, windows, common = _ready(num_tokens)
    base = None
    schemes = (*(name for name, found in SCHEMES.items() if found.quantize), "fp8 both")
    for scheme in ("as it is", *(name for name in schemes if not names or name.partition(" ")[0] in names)):
        started_at = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
        error = 0.0 if scheme == "as it is" else _round(model, scheme.partition(" ")[0])
        with _rounded_activations(model) if scheme == "fp8 both" else _nothing():
            perplexity = _perplexity(model, windows)
        base = base or perplexity
        append_row(out, common | {
            "scheme": scheme, "perplexity": round(perplexity, 4), "drift": round(perplexity / base - 1, 5), "weight_error": round(error, 5),
        })  # fmt: skip
        print(f"{scheme}: {perplexity:.3f} ({perplexity / base - 1:+.2%}) in {time.monotonic() - started_at:.0f} s", flush=True)
    return True


def measure_kv(out: Path, num_tokens: int) -> bool:
    """A row for keys and values in float32, as the model has them here, and one for each type that a cache may have on a GPU."""
    model_dir, windows, common = _ready(num_tokens)
    common |= {"part": "kv", **{name: value for name, value in stamp("", "cpu", None).items() if name in ("day", "commit")}}
    roundings: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "float32": lambda x: x,
        "bfloat16": lambda x: x.bfloat16().float(),
        "fp8": lambda x: kv_dtype.stored(x, kv_dtype.FP8).view(kv_dtype.FP8).float(),
    }
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
    rounded = _RoundedKv(model)
    found = {name: _Drift() for name in roundings}
    for window in windows:
        exact = None
        for name, rounding in roundings.items():
            logits = rounded.logits(window, rounding)
            exact = logits if exact is None else exact
            found[name].add(logits, exact, window)
        print(f"{window.numel()} tokens more, of {windows.numel()}", flush=True)
    base = found["float32"].perplexity
    for name, drift in found.items():
        append_row(out, common | {"kv": name, "drift": round(drift.perplexity / base - 1, 5)} | drift.figures())
        print(
            f"{name}: {drift.perplexity:.3f} ({drift.perplexity / base - 1:+.2%}), logits off by {drift.greatest:.3f} at most", flush=True
        )
    return True


@dataclass(slots=True)
class _Drift:
    """Sums over windows: how far logits are from the exact ones, and what they make of the text."""

    loss: float = 0.0
    num_losses: int = 0
    num_tokens: int = 0
    num_same: int = 0
    greatest: float = 0.0
    total: float = 0.0
    num_logits: int = 0
    squares: float = 0.0
    spread: float = 0.0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, window: torch.Tensor) -> None:
        """One window's: [tokens, vocabulary] each."""
        self.loss += nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
        self.num_losses += window.numel() - 1
        off = (logits - exact).abs()
        self.greatest = max(self.greatest, off.max().item())
        self.total += off.sum(dtype=torch.float64).item()
        self.squares += off.square().sum(dtype=torch.float64).item()
        self.spread += (exact - exact.mean(-1, keepdim=True)).square().sum(dtype=torch.float64).item()
        self.num_logits += off.numel()
        self.num_tokens += window.numel()
        self.num_same += int((logits.argmax(-1) == exact.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """Of all windows' tokens but each first."""
        return math.exp(self.loss / self.num_losses)

    def figures(self) -> Row:
        """As a row has them. `logit_error_relative`: of the logits' spread around their mean, by squares."""
        return {
            "perplexity": round(self.perplexity, 4),
            "logit_error_max": round(self.greatest, 4),
            "logit_error_mean": round(self.total / self.num_logits, 5),
            "logit_error_relative": round(math.sqrt(self.squares / self.spread), 5),
            "same_greedy": round(self.num_same / self.num_tokens, 5),
        }


class _RoundedKv:
    """The model with keys (after rotary embedding) and values rounded before torch's attention sees them, as a cache that is written first
    and then read does."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._rounding = model, lambda x: x
        AttentionInterface.register("rounded_kv", self._attend)
        model.set_attn_implementation("rounded_kv")

    @torch.inference_mode()
    def logits(self, window: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """[tokens, vocabulary]"""
        self._rounding = rounding
        return self._model(window[None], use_cache=False).logits[0]

    def _attend(self, module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, self._rounding(key), self._rounding(value), attention_mask, **kwargs)


def _ready(num_tokens: int) -> tuple[Path, torch.Tensor, Row]:
    """The embedded model's folder, the text's windows, and what every row says of them."""
    from examples.embedded_model import DEFAULT_DIR, ensure_model

    ensure_model(DEFAULT_DIR, progress=False)
    windows = _windows(DEFAULT_DIR, num_tokens)
    return DEFAULT_DIR, windows, {
        "part": "perplexity", "model": "SmolLM2-135M-Instruct", "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "num_tokens": windows.numel(), "window": WINDOW, "versions": installed(),
    }  # fmt: skip


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

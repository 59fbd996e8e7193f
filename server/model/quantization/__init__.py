"""Quantized bases: the registry of schemes, one file each, and what a checkpoint or `--quantize` asks for.

Owns the names. Loading is loading.py's, the linear that stands in a quantized one's place linear.py's. Called by model/load.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.model.quantization import awq, fp8, gptq, hqq, int4, int8, int8_bnb, nf4
from server.model.quantization.scheme import Reader, Scheme

SCHEMES: dict[str, Scheme] = {module.SCHEME.name: module.SCHEME for module in (fp8, int8, int4, hqq, nf4, int8_bnb, awq, gptq)}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is done to a base: its scheme, the reader of a checkpoint that is quantized already, and whether the output head is too."""

    scheme: Scheme
    reader: Reader | None = None
    head: bool = False


def choose_quantization(asked: str | None, config: Mapping[str, Any] | None, *, head: bool = False) -> Quantization | None:
    """From --quantize and a checkpoint's quantization_config; None if nothing is quantized. ValueError if they contradict each other, or
    name what there is not."""
    if asked is not None and asked not in SCHEMES:
        raise ValueError(f"quantize '{asked}' is not known; allowed: {', '.join(SCHEMES)}")
    if config is None:
        if asked is None:
            return None
        scheme = SCHEMES[asked]
        if scheme.quantize is None:
            raise ValueError(
                f"quantize '{asked}' needs a checkpoint that was made so; this one is not quantized. While loading: {_on_the_fly()}"
            )
        return Quantization(scheme, head=head)
    method = _method(config)
    found = next((scheme for scheme in SCHEMES.values() if scheme.method == method), None)
    if found is None or found.reader is None:
        read = ", ".join(sorted({str(scheme.method).partition("-")[0] for scheme in SCHEMES.values() if scheme.method}))
        raise ValueError(f"the checkpoint's quantization_config.quant_method is '{method}', which is not read; those that are: {read}")
    if asked not in (None, found.name):
        raise ValueError(f"quantize '{asked}', but the checkpoint is quantized already, as '{found.name}'")
    return Quantization(found, found.reader(config), head=head)


def _method(config: Mapping[str, Any]) -> str:
    """`quant_method`, with bitsandbytes' two kinds told apart."""
    method = str(config.get("quant_method"))
    if method != "bitsandbytes":
        return method
    return "bitsandbytes-int8" if config.get("load_in_8bit") else "bitsandbytes-nf4"


def _on_the_fly() -> str:
    return ", ".join(name for name, scheme in SCHEMES.items() if scheme.quantize)

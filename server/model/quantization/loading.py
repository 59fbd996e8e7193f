"""Loading a base with quantized linears: transformers builds the model and reads all else; the linears are read here, one at a time.

The seam is transformers' own quantizer: before any weight is read, every linear that is to be quantized is replaced; after, each is read
from its safetensors, moved to its device, rounded or repacked, and only then the next. No more than one linear is ever there in full.
`quantize_model` does the same to a model that is there already. Called by model/load.py and by benchmarks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from server.kernels.quantized import QuantizedWeight
from server.model.quantization import Quantization
from server.model.quantization.linear import QuantizedLinear
from server.model.quantization.scheme import Scheme

METHOD = "manylora"
# Small, and what they decide is decided once and for all of a token: which expert it goes to.
_KEPT = ("gate", "router", "shared_expert_gate")


class LoadConfig(QuantizationConfigMixin):
    """What transformers hands from `from_pretrained` to the quantizer below."""

    def __init__(self, quantization: Quantization, tensors: "Tensors") -> None:
        self.quant_method, self.quantization, self.tensors = METHOD, quantization, tensors

    def to_dict(self) -> dict[str, Any]:
        """For transformers' logs and copies of a config."""
        return {"quant_method": METHOD, "scheme": self.quantization.scheme.name}

    def __deepcopy__(self, memo: dict) -> "LoadConfig":
        return self


class LinearQuantizer(HfQuantizer):
    """transformers' hooks before and after it reads the weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        replace_linears(model, config.quantization, config.tensors)
        model._keys_to_ignore_on_load_unexpected = {r".*"}  # the linears' tensors, which are read below; a missing one is an error there
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        fill_linears(model, config.quantization, config.tensors)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """Nothing is saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Nor trained."""
        return False


def register() -> None:
    """Make the quantizer known to transformers, once."""
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, LinearQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LoadConfig)


class Tensors:
    """The tensors of a folder's safetensors by name, each read when it is asked for."""

    def __init__(self, model_dir: Path) -> None:
        self._files = {name: file for file in sorted(model_dir.glob("*.safetensors")) for name in _names(file)}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        """ValueError if there is none of this name."""
        if name not in self._files:
            raise ValueError(f"the checkpoint has no tensor '{name}'")
        with safe_open(self._files[name], framework="pt", device=str(device)) as file:
            return file.get_tensor(name)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def replace_linears(model: nn.Module, quantization: Quantization, tensors: Tensors) -> None:
    """Put a QuantizedLinear in the place of every linear that is to be quantized. ValueError if there is none."""
    reader = quantization.reader
    names = _linears(model, quantization) if reader is None else [
        name for name, module in model.named_modules() if type(module) is nn.Linear and f"{name}.{reader.mark}" in tensors
    ]  # fmt: skip
    if not names:
        where = (
            "the model has no linear layers of its own" if reader is None else f"no linear of the checkpoint has a tensor '{reader.mark}'"
        )
        raise ValueError(f"nothing can be quantized as '{quantization.scheme.name}': {where}")
    for name in names:
        _replace(model, name)


def fill_linears(model: nn.Module, quantization: Quantization, tensors: Tensors) -> None:
    """Read the replaced linears, one after the other. ValueError names the one that cannot be."""
    device = model.get_input_embeddings().weight.device
    check_card(quantization.scheme, device)
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        with _named(name):
            if quantization.reader is None:
                module.quantized = _quantize(quantization.scheme, tensors.get(f"{name}.weight", device))
            else:
                read = {tensor: tensors.get(f"{name}.{tensor}", device) for tensor in quantization.reader.names}
                module.quantized = quantization.reader.read(read, module.in_features, module.out_features)


@torch.no_grad()
def quantize_model(model: nn.Module, quantization: Quantization) -> None:
    """Quantize the linears of a model that is there, one after the other. ValueError names the one that cannot be."""
    check_card(quantization.scheme, model.get_input_embeddings().weight.device)
    for name in _linears(model, quantization):
        weight = model.get_submodule(name).weight.data
        module = _replace(model, name)
        with _named(name):
            module.quantized = _quantize(quantization.scheme, weight)


def check_card(scheme: Scheme, device: torch.device) -> None:
    """ValueError if a GPU has not what the scheme needs."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < scheme.card:
        have = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        need = ".".join(str(part) for part in scheme.card)
        raise ValueError(f"quantize '{scheme.name}' needs a GPU of compute capability {need} or above; this one has {have}")


def _linears(model: nn.Module, quantization: Quantization) -> list[str]:
    """Names of the linears that are quantized while loading: all of the decoder's, and the output head if that is asked for."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name.rpartition(".")[2] in _KEPT:
            continue
        if module is not head or (quantization.head and module.weight is not embedding.weight):
            names.append(name)
    return names


def _replace(model: nn.Module, name: str) -> QuantizedLinear:
    old = model.get_submodule(name)
    new = QuantizedLinear(old.in_features, old.out_features, old.bias)
    model.set_submodule(name, new)
    return new


def _quantize(scheme: Scheme, weight: torch.Tensor) -> QuantizedWeight:
    assert scheme.quantize is not None
    return scheme.quantize(weight)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

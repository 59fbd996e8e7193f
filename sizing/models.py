"""A model's shape from its config.json, from a folder with safetensors headers, or from the table of well-known models.

Owns the refusal of what is not known. No weights are read: the header of a safetensors file says names, types and shapes. The planner and
the recorder of the engine's memory (benchmarks.gpu_memory) call it.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sizing.architectures import FAMILIES, layer_of
from sizing.config import Config
from sizing.errors import SizingError
from sizing.headers import read_headers
from sizing.quantization import ALIASES, SCHEMES
from sizing.shape import Linear, ModelShape

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MODELS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def shape_of(name: str, values: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. SizingError names the model and what is not known of it."""
    config = Config(name, values)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise SizingError(
            f"model {name}: the shape of architecture '{config.model_type}' is not known. Known: {', '.join(sorted(FAMILIES))}"
        )
    vocab, width = config.number("vocab_size"), family.embedding_dim(config)
    head = None if config.flag("tie_word_embeddings", family.tied) else Linear("lm_head", width, vocab, family.head_bias)
    final_norm = family.norm_width * config.hidden if family.final_norm else 0
    return ModelShape(
        name=name,
        model_type=config.model_type,
        hidden_size=width,
        vocab_size=vocab,
        layers=tuple(layer_of(family, config, index) for index in range(config.number("num_hidden_layers"))),
        embedding_params=vocab * width,
        head=head,
        other_params=final_norm + family.outside(config),
        outer_groups=family.outer(config),
        max_positions=config.number("max_position_embeddings", 0) or None,
        dtype=_dtype_of(config),
        quantization=_quantization_of(config),
    )


def shape_of_file(path: Path, name: str) -> ModelShape:
    """The shape of a config.json, or of a folder in Hugging Face's layout: config.json, and the headers of what *.safetensors it has."""
    folder = path if path.is_dir() else path.parent
    config = Config.read(name, folder / "config.json" if path.is_dir() else path)
    shape = shape_of(config.name, config.values)
    headers = read_headers(config.name, folder) if path.is_dir() else {}
    if not headers:
        return shape
    tied = {"lm_head.weight"} if shape.is_tied and "lm_head.weight" in headers else set()
    kept = [tensor for key, tensor in headers.items() if key not in tied]
    return dataclasses.replace(
        shape, stored_bytes=sum(tensor.num_bytes for tensor in kept), num_params_seen=sum(tensor.num_values for tensor in kept)
    )


def known_shape(model_id: str) -> ModelShape:
    """The shape of a model of sizing/models.toml, by its name there or the hub's. SizingError says how to plan another one."""
    wanted = model_id.rpartition("/")[2].lower()
    for name, entry in MODELS.items():
        if wanted == name or wanted in (other.rpartition("/")[2].lower() for other in entry["names"]):
            return shape_of(model_id, entry["config"])
    near = difflib.get_close_matches(wanted, _names(), n=3, cutoff=0.5) or sorted(MODELS)
    raise SizingError(
        f"model {model_id}: its shape is not known: it is not in sizing/models.toml (near it: {', '.join(near)}), and no config.json of it "
        "was given"
    )


def known_models() -> dict[str, ModelShape]:
    """Every model of the table, by its name there."""
    return {name: shape_of(name, entry["config"]) for name, entry in MODELS.items()}


def _names() -> list[str]:
    return [*MODELS, *(other.rpartition("/")[2].lower() for entry in MODELS.values() for other in entry["names"])]


def _dtype_of(config: Config) -> str:
    value = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(value).removeprefix("torch."), "bf16")


def _quantization_of(config: Config) -> str | None:
    """The scheme of a checkpoint that is quantized already. SizingError if it is one that has no entry in `quantization`."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = str(found.get("quant_method"))
    if method == "bitsandbytes":
        method = "nf4" if found.get("load_in_4bit") else "int8-bnb"
    scheme = ALIASES.get(method, method)
    if scheme not in SCHEMES:
        raise SizingError(f"model {config.name}: its checkpoint is quantized by '{method}', which is unknown. Known: {', '.join(SCHEMES)}")
    return scheme

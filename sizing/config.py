"""A model's config.json as `architectures` asks it: under one name what architectures call differently, and errors that name the key."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sizing.errors import SizingError

# Ours -> what config.json may call it.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_experts": ("num_experts", "num_local_experts"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}
_DEFAULT_HEAD_DIM = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "glm": 128, "glm4": 128, "qwen3": 128, "gpt_oss": 64}
_LARGEST = 1 << 40


class Config:
    """The values of one config.json. `name`: what the model is called in errors."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name, self.values = name, values

    @classmethod
    def read(cls, name: str, path: Path) -> "Config":
        """A file's. SizingError if it is not there or no JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SizingError(f"model {name}: {path} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise SizingError(f"model {name}: {path} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise SizingError(f"model {name}: {path} is not an object")
        return cls(name, values)

    def without(self, *keys: str) -> "Config":
        """The same without some of its keys."""
        return Config(self.name, {key: value for key, value in self.values.items() if key not in keys})

    def get(self, key: str) -> Any:
        """The value, or None."""
        return next((self.values[name] for name in _NAMES.get(key, (key,)) if self.values.get(name) is not None), None)

    def number(self, key: str, default: int | None = None) -> int:
        """A count. SizingError names the key if it is missing and there is no default, or is no count."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise SizingError(f"model {self.name}: its config.json has no {key}, so its shape is not known")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
            raise SizingError(f"model {self.name}: {key} in its config.json must be a whole number. Given: {value!r}")
        return value

    def flag(self, key: str | bool, default: bool = False) -> bool:
        """Whether a key is true; a bool stands for itself."""
        if isinstance(key, bool):
            return key
        value = self.get(key)
        return default if value is None else bool(value)

    @property
    def model_type(self) -> str:
        """The architecture."""
        value = self.get("model_type")
        if not isinstance(value, str):
            raise SizingError(f"model {self.name}: its config.json has no model_type, so its shape is not known")
        return value

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.number("hidden_size")

    @property
    def heads(self) -> int:
        """Query heads."""
        heads = self.number("num_attention_heads")
        if heads < 1:
            raise SizingError(f"model {self.name}: num_attention_heads in its config.json must be at least 1. Given: {heads}")
        return heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; as many as query heads where nothing is said."""
        return self.number("num_key_value_heads", 0) or self.heads

    @property
    def head_dim(self) -> int:
        """Values a head."""
        return self.number("head_dim", 0) or _DEFAULT_HEAD_DIM.get(self.model_type) or self.hidden // self.heads

    def window(self, layer: int, rule: Callable[["Config", int], bool]) -> int | None:
        """The positions that a layer's tokens see; None: all. `rule` decides where the config has no layer_types."""
        window = self.number("sliding_window", 0) or None
        kinds = self.get("layer_types")
        if window is None or self.values.get("use_sliding_window") is False:
            return None
        if isinstance(kinds, list) and layer < len(kinds):
            return window if kinds[layer] == "sliding_attention" else None
        return window if rule(self, layer) else None

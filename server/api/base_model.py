"""The base model as the API sees it: its folder's small files, never its weights.

Owns the base's names, tokenizer, end tokens and length. Made once by api.app; the routes read it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.api.text.tokenizer import Tokenizer, load_tokenizer, read_json
from server.settings import Settings

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class ServedModel:
    """The base model of this server."""

    name: str  # as /v1/models lists it
    names: frozenset[str]  # what a request's `model` may say for the base
    folder: Path
    architecture: str
    max_positions: int | None
    revision: str
    tokenizer: Tokenizer

    @classmethod
    def from_settings(cls, settings: Settings) -> "ServedModel":
        """ValueError, naming the setting or file, if the folder is no model that can be served."""
        folder = Path(settings.model_id).expanduser()
        if not folder.is_dir():
            raise ValueError(f"--model-id {settings.model_id}: there is no such folder (a hub or S3 model has to be fetched first)")
        config = read_json(folder / "config.json")
        if not config:
            raise ValueError(f"--model-id {settings.model_id}: no config.json in that folder")
        name = settings.served_model_name or folder.resolve().name
        return cls(
            name=name,
            names=frozenset({name, settings.model_id, folder.resolve().name, ""}),
            folder=folder.resolve(),
            architecture=next(iter(config.get("architectures") or []), config.get("model_type", "unknown")),
            max_positions=_max_positions(config),
            revision=settings.revision or "",
            tokenizer=load_tokenizer(folder, extra_eos=_eos_ids(folder, config)),
        )


def _max_positions(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    for key in _LENGTH_KEYS:
        for part in (config, text if isinstance(text, dict) else {}):
            if isinstance(part.get(key), int):
                return part[key]
    return None


def _eos_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """Of generation_config.json, else of config.json; the tokenizer's own is added to them."""
    value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [id for id in ids if isinstance(id, int) and not isinstance(id, bool)]

"""Which files of a listing make up an adapter. Owns the names; does not know where a listing comes from.

PEFT's layout: adapter_config.json and adapter_model.safetensors. Weights under other names (shards) are taken when that file is
missing; tokenizer files come along because they change what the adapter answers. Everything else stays where it is.
"""

import re
from collections.abc import Iterable

from server.errors import AdapterRefused
from server.sources.base import SourceFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_SUFFIX = ".safetensors"
TOKENIZER_NAMES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    }
)
MAX_CONFIG_BYTES = 1 << 20
MAX_LISTED = 10_000  # files beside each other; more is a mistaken id (a whole bucket) and would make a snapshot slow
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NOT_WEIGHTS = re.compile(r"arguments|args|training|optimizer|scheduler|scaler|random_states|rng_state", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def select_files(adapter_id: str, listing: Iterable[SourceFile], max_bytes: int | None) -> tuple[SourceFile, ...]:
    """The files of the adapter, by name. AdapterRefused: config or weights missing, weights only as a pickle, odd names, too large."""
    by_name = {file.name: file for file in listing}
    if CONFIG_NAME not in by_name:
        raise AdapterRefused(f"Adapter '{adapter_id}' has no {CONFIG_NAME}")
    if by_name[CONFIG_NAME].size_bytes > MAX_CONFIG_BYTES:
        raise AdapterRefused(f"Adapter '{adapter_id}': {CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes")
    names = {CONFIG_NAME, *_weights(adapter_id, by_name), *(TOKENIZER_NAMES & by_name.keys())}
    files = tuple(by_name[name] for name in sorted(names))
    size_bytes = sum(file.size_bytes for file in files)
    if max_bytes is not None and size_bytes > max_bytes:
        raise AdapterRefused(f"Adapter '{adapter_id}' has {size_bytes} bytes; at most {max_bytes} are allowed (max-adapter-bytes)")
    return files


def weights_in(names: Iterable[str]) -> set[str]:
    """Every *.safetensors of a listing, an adapter's weights or not."""
    return {name for name in names if name.endswith(WEIGHTS_SUFFIX)}


def _weights(adapter_id: str, by_name: dict[str, SourceFile]) -> set[str]:
    if WEIGHTS_NAME in by_name:  # PEFT then reads this one alone
        return {WEIGHTS_NAME}
    weights = {name for name in weights_in(by_name) if not _NOT_WEIGHTS.search(name)}
    if not weights:
        pickles = sorted(name for name in by_name if name.endswith(_PICKLES) and not _NOT_WEIGHTS.search(name))
        if pickles:
            raise AdapterRefused(
                f"Adapter '{adapter_id}' has its weights only as a pickle ({ascii(pickles[0])}). A pickle can run code when it is read, "
                f"so only *{WEIGHTS_SUFFIX} are taken: save it again with PEFT's save_pretrained(safe_serialization=True)"
            )
        raise AdapterRefused(f"Adapter '{adapter_id}' has no weights ({WEIGHTS_NAME})")
    for name in weights:
        if not _PLAIN_NAME.fullmatch(name):  # the name becomes a file's name on our disk
            raise AdapterRefused(f"Adapter '{adapter_id}': weights file {ascii(name)} must have a name of letters, digits, `.`, `_`, `-`")
    return weights

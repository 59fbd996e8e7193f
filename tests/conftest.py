"""What several packages of tests share: the embedded model, made once."""

import os
from pathlib import Path

import pytest

# Products here are tiny, and threads that wait for each other spin: a second one takes more time than it saves, and its CPU from the other
# worker of `make test`. For this process and those that it starts; where a test asks for two (tests/e2e/test_serve.py), they wait asleep.
# Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get("MANYLORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported first: its kernels then run on CPU tensors


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Folder of the embedded model (SmolLM2-135M-Instruct); skipped by name where its package is missing."""
    from examples.embedded_model import DEFAULT_DIR, ModelUnavailable, ensure_model

    try:
        ensure_model(DEFAULT_DIR, progress=False)
    except ModelUnavailable as error:
        pytest.skip(f"the embedded model: {error}")
    return DEFAULT_DIR

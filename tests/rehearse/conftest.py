"""What the rehearsal needs, or the reason why its tests are skipped; CI, which has made all of it, wants them run."""

import os
import tempfile
from pathlib import Path

import pytest

from rehearse.cdk import CDK
from rehearse.emulator_process import PYTHON, Emulator


@pytest.fixture(scope="session")
def emulator_ready():
    if not PYTHON.is_file():
        _leave(f"there is no {PYTHON.parts[-3]}")


@pytest.fixture(scope="session")
def rehearsal_ready(emulator_ready, model_dir):
    if not CDK.exists():
        _leave("there is no CDK command line")


def _leave(reason: str) -> None:
    text = f"{reason}: run `make rehearse-ready`"
    pytest.fail(text) if os.environ.get("CI") else pytest.skip(text)


@pytest.fixture
def short_folder():
    """Sockets lie below it, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="rehearse-") as name:
        yield Path(name)


@pytest.fixture
def emulator(emulator_ready, short_folder):
    with Emulator(short_folder) as emulator:
        yield emulator

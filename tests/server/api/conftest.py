"""Fixtures of the API's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.live import LiveServer, live_server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    """One server for a module's tests; the engine's behaviour is reset for each by `live`."""
    with live_server(tmp_path_factory.mktemp("live"), model_dir) as server:
        yield server


@pytest.fixture
def live(shared: LiveServer) -> LiveServer:
    """The module's server, its engine well-behaved."""
    if shared.api.engine.stats is None or (shared.folder / "control.json").read_text() != "{}":
        shared.control()
    return shared

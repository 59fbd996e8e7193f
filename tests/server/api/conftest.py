"""Fixtures of the API's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.fleet import KEY
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[tuple[LiveServer, LiveServer]]:
    """Two servers of one fleet: adapters and registry in common, each with a store of its own."""
    root = tmp_path_factory.mktemp("fleet")
    (root / "adapters").mkdir()
    common = {"adapters_dir": root / "adapters", "registry_dir": root / "registry", "admin_key": KEY, "registry_poll_s": 0.05}
    with live_server(root / "a", model_dir, **common) as a, live_server(root / "b", model_dir, **common) as b:
        yield a, b


@pytest.fixture
def fleet(pair: tuple[LiveServer, LiveServer]) -> tuple[LiveServer, LiveServer]:
    """The module's two servers, their engines well-behaved."""
    for live in pair:
        live.control()
    return pair

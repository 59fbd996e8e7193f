"""One fleet with two tenants for all tests of this folder: servers take seconds to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.live import LiveServer
from tests.server.api.tenants.world import RULES, World


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tenants"))


@pytest.fixture(scope="package")
def servers(made: World, model_dir: Path) -> Iterator[tuple[LiveServer, LiveServer]]:
    with made.server("a", model_dir) as a, made.server("b", model_dir, json_output=True) as b:
        yield a, b


@pytest.fixture
def world(made: World) -> Iterator[World]:
    yield made
    if made.tenants_file.read_text() != RULES:
        made.write(RULES)


@pytest.fixture
def fleet(servers: tuple[LiveServer, LiveServer], world: World) -> tuple[LiveServer, LiveServer]:
    """Both by the usual rules, their engines well-behaved."""
    for one in servers:
        one.control()
        world.settle(one)
    return servers


@pytest.fixture
def live(fleet: tuple[LiveServer, LiveServer]) -> LiveServer:
    return fleet[0]

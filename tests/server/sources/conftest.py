"""Worlds for the sources (see worlds.py), and an environment in which no ambient credential can be found."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.sources import FACTORIES
from tests.server.sources.hub_stand_in import HubStandIn
from tests.server.sources.worlds import HubWorld, LocalWorld, S3World, World


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fake AWS keys for moto; a hub token on this machine that nobody may send; no proxy before 127.0.0.1."""
    ambient = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_HUB_OFFLINE")
    for name in (*ambient, "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_TOKEN", "hf_ambient_token_of_the_machine")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto's server, once for all tests since it takes half a second to stop."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def local(tmp_path: Path) -> LocalWorld:
    return LocalWorld(tmp_path / "adapters")


@pytest.fixture
def s3(environment: None, s3_endpoint: str) -> S3World:
    return S3World(s3_endpoint)


@pytest.fixture
def hub(environment: None) -> Iterator[HubWorld]:
    with HubStandIn() as stand_in:
        yield HubWorld(stand_in)


@pytest.fixture(params=sorted(FACTORIES))
def world(request: pytest.FixtureRequest) -> tuple[str, World]:
    """(name of the source, its world) for every registered source: the fixture of that name."""
    return request.param, request.getfixturevalue(request.param)

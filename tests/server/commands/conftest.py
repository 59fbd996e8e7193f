"""A live API process with a fake engine, and `run`: a command as a shell would run it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server import commands
from tests.server.api.live import LiveServer, live_server

KEY = "an-admin-key-of-a-test"


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("commands"), model_dir, admin_key=KEY, max_total_tokens=512) as server:
        yield server


@pytest.fixture
def live(shared: LiveServer) -> LiveServer:
    shared.control()
    return shared


@pytest.fixture
def run(live: LiveServer, capsys: pytest.CaptureFixture) -> Run:
    """`run("adapters", "list", ...)`: against the live server with its key, unless `environ` says otherwise."""

    def run(*argv: str, environ: dict[str, str] | None = None) -> Ran:
        capsys.readouterr()
        status = commands.run(argv, {"MANYLORA_SERVER": live.base_url, "MANYLORA_KEY": KEY} if environ is None else environ)
        said = capsys.readouterr()
        return Ran(status, said.out, said.err)

    return run

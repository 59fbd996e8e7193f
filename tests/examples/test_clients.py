"""Each client of examples/clients talks to a server, as its users start it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.live import LiveServer, live_server
from tests.server.api.test_adapters import write_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    """The fake engine: it answers with the prompt, an adapter turns it around."""
    folder = tmp_path_factory.mktemp("clients")
    write_adapter(folder / "adapters" / "mine")
    with live_server(folder, model_dir) as live:
        yield live


def run(command: list[str], server: LiveServer) -> str:
    done = subprocess.run([*command, server.base_url, "mine"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_curl(server: LiveServer) -> None:
    shown = run(["examples/clients/curl.sh"], server)
    assert '{"generated_text":"The capital of France is' in shown and "data: {" in shown
    assert '"object":"chat.completion"' in shown and '"id":"mine"' in shown


@needs_curl
def test_curl_says_what_is_wrong(server: LiveServer) -> None:
    command = ["examples/clients/curl.sh", server.base_url, "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "'nobody' was not found" in done.stdout


@pytest.mark.parametrize("name", ["lorax_client", "openai_client"])
def test_python(server: LiveServer, name: str) -> None:
    pytest.importorskip(name.removesuffix("_client"))
    shown = run([sys.executable, "-m", f"examples.clients.{name}"], server)
    assert len(shown.partition("stream: ")[2].strip()) > 4

"""Two tenants on the embedded model, as an operator sets them up: the command line, the file, keys; what each may call, and whose cache is
whose."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_serve import EXAMPLES, QUESTION, ROOT, Server
from tests.server.api.live import wait_for

pytestmark = pytest.mark.slow

RULES = """
[defaults]
sources = { local = ["{tenant}"] }
limits = { tokens_a_minute = 100000 }
[shared]
sources = { local = ["common"] }
prefix_cache = false
[tenants.acme]
[tenants.beta]
"""
SEA = "Tell me of the sea and of the ships that sail on it. " * 6
SHARED_CACHE = RULES.replace("prefix_cache = false", "prefix_cache = true")


class World:
    def __init__(self, model_dir: Path, folder: Path) -> None:
        self.folder, self.rules = folder, folder / "tenants.toml"
        for name, place in (("sql", "acme/mine"), ("json", "beta/mine"), ("pirate", "common/pirate")):
            shutil.copytree(EXAMPLES / name, folder / "adapters" / place)
        self.rules.write_text(RULES)
        self.keys = {tenant: self.command("create", "--tenant", tenant)["key"] for tenant in ("acme", "beta")}
        flags = [
            "--tenants-file",
            str(self.rules),
            "--registry-dir",
            str(folder / "registry"),
            "--max-total-tokens",
            "512",
            "--num-threads",
            "1",
        ]
        self.server = Server(model_dir, folder / "adapters", folder, *flags)

    def command(self, *argv: str) -> dict:
        command = [sys.executable, "-m", "server", "keys", *argv, "--json", "--registry-dir", str(self.folder / "registry")]
        done = subprocess.run([*command, "--tenants-file", str(self.rules)], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def chat(self, tenant: str, model: str, content: str = QUESTION, status: int = 200) -> dict:
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 4}
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        answer = self.server.client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    def text(self, tenant: str, model: str) -> str:
        return self.chat(tenant, model)["choices"][0]["message"]["content"]

    def num_cached(self, tenant: str, model: str, content: str) -> int:
        return self.chat(tenant, model, content)["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def world(model_dir, tmp_path_factory):
    made = World(model_dir, tmp_path_factory.mktemp("tenants"))
    made.server.wait_healthy()
    yield made
    assert made.server.stop() in (0, -signal.SIGTERM), made.server.log_path.read_text()


def test_each_calls_its_own_by_the_same_name(world) -> None:
    for tenant in ("acme", "beta"):
        headers = {"authorization": f"Bearer {world.keys[tenant]}"}
        body = {"name": "best", "id": f"{tenant}/mine"}
        assert world.server.client.post("/v1/adapters", json=body, headers=headers).status_code == 200
    assert world.text("acme", "best").startswith("SELECT") and world.text("beta", "best").startswith("{")
    absent, anothers = (world.chat("acme", name, status=404) for name in ("beta/none", "beta/mine"))
    assert json.dumps(anothers).replace("beta/mine", "beta/none") == json.dumps(absent)


def test_nobody_reads_anothers_prefix_cache_unless_the_file_says_so(world) -> None:
    """The engine itself counts what it read from its cache."""
    world.num_cached("acme", "common/pirate", SEA)
    mine = world.num_cached("acme", "common/pirate", SEA)
    assert mine > 60  # its own, the second time
    theirs = world.num_cached("beta", "common/pirate", SEA)
    assert theirs < mine and theirs < 40
    world.rules.write_text(SHARED_CACHE)
    wait_for(lambda: "the file was read again" in world.server.log_path.read_text(), 60)
    world.num_cached("acme", "common/pirate", SEA)
    assert world.num_cached("beta", "common/pirate", SEA) == mine


def test_a_revoked_key_and_the_log(world) -> None:
    prefix = world.keys["beta"][:14]
    assert world.command("revoke", prefix)["state"] == "revoked"
    headers = {"authorization": f"Bearer {world.keys['beta']}"}
    wait_for(lambda: world.server.client.get("/v1/models", headers=headers).status_code == 401, 60)
    log = world.server.log_path.read_text()
    assert re.search(r"/v1/chat/completions [0-9a-f]{32} status=200 finish=\S+ tenant=acme adapter=acme.best", log)
    for secret in (*world.keys.values(), "ships that sail", QUESTION):
        assert secret not in log

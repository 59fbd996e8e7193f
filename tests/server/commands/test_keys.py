"""`python -m server keys`: what it prints, and that running servers follow it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server import commands
from server.commands.keys import main
from tests.server.api.live import ROOT, wait_for
from tests.server.api.tenants.world import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tenants.toml").write_text("[tenants.acme]\n[tenants.beta]\n")
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {"MANYLORA_REGISTRY_DIR": str(folder / "registry"), "MANYLORA_TENANTS_FILE": str(folder / "tenants.toml")}


def run(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0, environ: dict[str, str] | None = None) -> Any:
    assert main(argv, environment(folder) if environ is None else environ) == status
    out, err = capsys.readouterr()
    return json.loads(out) if status == 0 and "--json" in argv else (out, err)


def test_a_key_is_printed_once_alone_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(folder, capsys, "create", "--tenant", "acme", "--label", "ci")
    key = out.strip()
    assert "\n" not in key and key.startswith("mlk_") and key not in err
    out, _ = run(folder, capsys, "list")
    assert key[:14] in out and key not in out and "acme" in out and "active" in out and "ci" in out
    assert key not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(folder, capsys, "create", "--tenant", "acme", "--expires", "2d", "--json")
    assert made["key"].startswith(made["prefix"]) and made["state"] == "active"
    assert made["expires_at"] - made["created_at"] in range(2 * 86_400, 2 * 86_400 + 60)
    run(folder, capsys, "create", "--tenant", "beta", "--json")
    listed = run(folder, capsys, "list", "--json")
    assert [row["tenant"] for row in listed["keys"]] == ["acme", "beta"] and "key" not in listed["keys"][0]
    assert run(folder, capsys, "revoke", made["prefix"], "--json")["state"] == "revoked"
    assert [row["state"] for row in run(folder, capsys, "list", "--tenant", "acme", "--json")["keys"]] == ["revoked"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["create", "--tenant", "gamma"], "has no tenant of that name"),
        (["create", "--tenant", "ac/me"], "no separators"),
        (["create"], "--tenant"),
        (["create", "--tenant", "acme", "--expires", "soon"], "--expires must be a number of hours, days or weeks"),
        (["create", "--tenant", "acme", "--expires", "0d"], "--expires must be"),
        (["create", "--tenant", "acme", "--label", "a\nb"], "--label"),
        (["create", "--tenant", "acme", "--lable", "x"], "--lable"),
        (["revoke", "mlk_0000000000"], "there is no key of that prefix"),
        (["rotate"], "invalid choice"),
        ([], "required"),
    ],
)
def test_mistakes_are_named(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    out, err = run(folder, capsys, *argv, status=2)
    assert words in err and err.startswith("error: ") and not out


def test_where_the_document_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the servers find it: flag, environment, the file of settings; else it is asked for."""
    out, err = run(folder, capsys, "list", status=2, environ={})
    assert "--registry-dir (or MANYLORA_REGISTRY_DIR)" in err
    (folder / "settings.toml").write_text(f'store_dir = "{folder / "store"}"\n')
    run(folder, capsys, "create", "--tenant", "acme", "--config", str(folder / "settings.toml"), environ={})
    assert (folder / "store" / "registry" / "keys" / "keys.json").is_file()
    (folder / "registry" / "keys").mkdir(parents=True)
    (folder / "registry" / "keys" / "keys.json").write_text("{")
    out, err = run(folder, capsys, "list", status=1)
    assert "keys.json" in err


def test_the_program_knows_its_commands(folder: Path) -> None:
    def program(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "server", *argv], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | environment(folder), timeout=120)  # fmt: skip

    assert "keys" in commands.names()
    made = program("keys", "create", "--tenant", "acme")
    assert made.returncode == 0 and made.stdout.startswith("mlk_")
    wrong = program("kyes")
    assert wrong.returncode == 2 and "unknown command 'kyes'; did you mean keys?" in wrong.stderr


def test_servers_that_run_follow(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made and revoked beside two running servers, which were not told."""
    world = World(tmp_path)
    flags = ["--registry-dir", str(tmp_path / "registry"), "--tenants-file", str(world.tenants_file), "--json"]
    with world.server("a", model_dir) as a, world.server("b", model_dir) as b:
        made = run(tmp_path, capsys, "create", "--tenant", "beta", *flags)
        headers = {"authorization": f"Bearer {made['key']}"}
        for live in (a, b):
            wait_for(lambda live=live: live.client.get("/v1/models", headers=headers).status_code == 200)
        run(tmp_path, capsys, "revoke", made["prefix"], *flags)
        for live in (a, b):
            wait_for(lambda live=live: live.client.get("/v1/models", headers=headers).status_code == 401)

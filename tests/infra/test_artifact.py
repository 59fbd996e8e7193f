"""The archive of the server and its installation: same content, same bytes; the lock as the shell computes it; pip's commands."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from infra.artifact import EXTRAS, digest_of, lock_of, read_content, write_archive

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def content():
    return read_content()


def names(text: str) -> list[str]:
    """Packages of a requirements file."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [re.split(r"[\[<>=~! ]", line)[0].lower().replace("_", "-") for line in lines if line]


def test_the_documented_wheelhouse_holds_all_that_an_instance_installs():
    """Without a way out, pip has the wheels alone: an extra that the archive asks for and the command leaves out ends the boot."""
    assert f"'.[{','.join(EXTRAS)}]' -r ami/kernel-requirements.txt" in (ROOT / "docs" / "deploy.md").read_text()


def test_the_archive_holds_what_an_instance_needs_and_nothing_else(content):
    server = {"server/__main__.py", "server/host/agent.py", "sizing/budget.py", "sizing/models.toml"}
    assert server | {"ami/install.sh", "ami/manylora.service", "constraints-gpu.txt"} <= set(content)
    tops = {name.split("/")[0] for name in content}
    assert tops == {"server", "sizing", "ami", "constraints-gpu.txt", "requirements.txt", "LICENSE"}
    assert not [name for name in content if "__pycache__" in name]


def test_every_file_of_the_folders_is_in_it(content):
    """A new kind of file would be left out silently otherwise."""
    for tree in ("server", "sizing", "ami"):
        for path in (ROOT / tree).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in content, path


def test_the_same_content_makes_the_same_bytes(content, tmp_path):
    for name in ("one.zip", "two.zip"):
        write_archive(content, tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert digest_of(content | {"server/x.py": b""}) != digest_of(content)
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("server/__init__.py") == (ROOT / "server" / "__init__.py").read_bytes()


def test_every_package_is_pinned_for_the_gpu(content):
    pinned = set(names(content["constraints-gpu.txt"].decode()))
    for file in ("requirements.txt", "ami/kernels.txt", "ami/kernel-requirements.txt"):
        missing = set(names(content[file].decode())) - pinned
        assert not missing, f"{file}: {missing}"


class Installation:
    """install.sh in a folder of its own, with a stand-in for the interpreter that writes down what pip is asked."""

    def __init__(self, folder: Path, content) -> None:
        self.prefix, self.calls = folder / "prefix", folder / "calls"
        self.release = self.prefix / "releases" / "one"
        write_archive(content, folder / "server.zip")
        with zipfile.ZipFile(folder / "server.zip") as archive:
            archive.extractall(self.release)
        self.python = folder / "python"
        self.python.write_text(
            "#!/bin/bash\n"
            f'echo "$*" >>{self.calls}\n'
            '[ "$1 $2" != "-m venv" ] || { mkdir -p "$3/bin" "$3/lib"; cp "$0" "$3/bin/python"; }\n'
            '[ -z "$FAIL_AT" ] || [[ "$*" != *"$FAIL_AT"* ]]\n'
        )
        self.python.chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": "/usr/bin:/bin", "PREFIX": str(self.prefix), "PYTHON": str(self.python), "FAIL_AT": "", **environment}
        command = ["bash", str(self.release / "ami" / "install.sh")]
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    @property
    def num_calls(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def installation(tmp_path, content):
    return Installation(tmp_path, content)


def test_the_lock_is_the_same_in_shell_and_in_python(installation, content):
    result = installation.run()
    assert result.returncode == 0, result.stderr
    environment = installation.prefix / "environments" / lock_of(content)
    assert (environment / ".complete").exists()
    assert (installation.prefix / "current").resolve() == installation.release
    assert (installation.release / ".venv").resolve() == environment


def test_packages_are_installed_once_with_the_gpus_versions(installation):
    installation.run(WHEELHOUSE="/wheels")
    calls = installation.calls.read_text()
    assert re.search(r"-c \S+constraints-gpu.txt --no-index --find-links /wheels -r \S+requirements.txt", calls)
    assert re.search(r"--no-deps -r \S+ami/kernels.txt", calls)
    before = installation.num_calls
    assert installation.run().returncode == 0 and installation.num_calls == before  # a second run asks for nothing


@pytest.mark.parametrize("step", ["/requirements.txt", "kernels.txt", "kernel-requirements.txt"])
def test_a_broken_installation_is_never_taken_for_one(installation, step):
    assert installation.run(FAIL_AT=step).returncode != 0
    assert not (installation.prefix / "current").exists()
    assert not list((installation.prefix / "environments").glob("*/.complete"))
    assert installation.run().returncode == 0 and (installation.prefix / "current").exists()

"""Tools whose reader has seen enough, as processes with a real pipe: what they say of it and how they end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.api.tenants.keys import KeyRing
from sizing.printing import CUT_OFF

ROOT = Path(__file__).parents[2]
TOOLS = {
    "one large write": "print('row\\n' * 100_000)",
    "many writes": "[print('row', flush=True) for _ in range(100_000)]",
    "what the last flush writes": "print('row')",
    "its help": "import argparse; argparse.ArgumentParser().parse_args(['-h'])",
    "rich": "from server.commands._client import _Console; [_Console().print('row') for _ in range(100_000)]",
}


def cut_off(*command: str) -> subprocess.CompletedProcess[str]:
    """The command's end, its stdout a pipe that nobody reads."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)


@pytest.mark.parametrize("work", TOOLS.values(), ids=TOOLS)
def test_a_tool_ends_without_a_word_as_sigpipe_would_end_it(work):
    program = f"import sys\nfrom sizing.printing import run_tool\ndef main():\n    {work}\n    return 3\nsys.exit(run_tool(main))"
    result = cut_off("-c", program)
    assert (result.returncode, result.stderr) == (CUT_OFF, "")


def test_the_planner_and_the_servers_commands_do(tmp_path):
    KeyRing(tmp_path).create("a-tenant", label="", expires_at=0)
    for command in ("infra.plan", "infra.plan --help", f"server keys list --registry-dir {tmp_path}"):
        result = cut_off("-m", *command.split())
        assert (result.returncode, result.stderr) == (CUT_OFF, "")


def test_a_reader_who_stays_is_told_all_and_the_status():
    program = "import sys\nfrom sizing.printing import run_tool\nsys.exit(run_tool(lambda: print('row\\n' * 9) or 3))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.count("row"), result.stderr) == (3, 9, "")


def test_a_peer_that_is_gone_is_an_error_as_ever():
    program = (
        "import os, sys\nfrom sizing.printing import run_tool\nread, write = os.pipe()\nos.close(read)\n"
        "sys.exit(run_tool(lambda: os.write(write, b'x')))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "BrokenPipeError" in result.stderr


@pytest.mark.parametrize("folder", ["infra", "benchmarks", "docs", "rehearse"])
def test_every_tool_ends_so(folder):
    """All that `python -m` starts by hand; not what another process of ours starts and reads."""
    inner = {"benchmarks/gpu/ours.py", "benchmarks/gpu/peer_vllm.py", "benchmarks/gpu/random_base.py", "benchmarks/gpu/serve.py"}
    inner |= {f"rehearse/{name}.py" for name in ("beside", "systemctl", "inside", "moved", "emulator/__main__")}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if re.search(r'^if __name__ == "__main__":', text, re.MULTILINE) and name not in inner:
            assert "run_tool(" in text, f"{name} ends in its own way"

"""What a G6 installs: constraints-gpu.txt resolves as it is, and differs from the CPU's versions only where it says so."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What torch 2.11 with CUDA and transformers 5.17 ask for beside them, and the kernels: constraints-gpu.txt's first two groups.
MAY_DIFFER = {"torch", "triton", "transformers", "huggingface-hub", "setuptools"}
KERNELS = {"flashinfer-python", "apache-tvm-ffi", "nvidia-cudnn-frontend", "cuda-tile", "einops", "ninja", "nvidia-ml-py", "tabulate"}


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    found = dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(key): value for key, value in found.items()}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_differs_from_the_cpu_only_where_it_must():
    cpu, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    of_cuda = {name for name in gpu if name.startswith(("nvidia-", "cuda-"))}
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} <= MAY_DIFFER | of_cuda
    assert gpu.keys() - cpu.keys() <= KERNELS | of_cuda
    assert {"torch", "triton", "transformers"} | KERNELS <= gpu.keys()


@pytest.mark.slow
def test_pip_resolves_it_for_python_312_on_linux(tmp_path):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["server"]
    (tmp_path / "wanted.txt").write_text("\n".join([*wanted, *sorted(KERNELS - {"flashinfer-python"})]))
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + ["manylinux2014_x86_64", "manylinux2010_x86_64", "linux_x86_64"]
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--dry-run", "--ignore-installed"),
        *("--use-feature=fast-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"),  # metadata, not wheels
        *(f"--platform={platform}" for platform in platforms),
        *("--target", str(tmp_path / "nowhere"), "--report", str(tmp_path / "report.json")),
        *("-c", str(ROOT / "constraints-gpu.txt"), "-r", str(tmp_path / "wanted.txt")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode and re.search(
        r"connection|timed out|Temporary failure|resolve host|No matching distribution found", done.stderr, re.I
    ):
        pytest.skip(f"no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    installed = {
        canonical(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    pinned = pins("constraints-gpu.txt")
    assert {name: version for name, version in installed.items() if pinned.get(name) != version} == {}
    assert installed["torch"] == "2.11.0" and installed["triton"] == "3.6.0"

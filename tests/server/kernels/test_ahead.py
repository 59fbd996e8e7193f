"""What the compiler makes of the kernels, for cards that need not be there: they compile, load vectors and spill nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
# In a process of its own: this one's Triton interprets.
PROGRAM = """
import json, sys
import torch
from server.kernels.ahead import Job, compile_pair
from server.kernels.grouped import GroupShape
from server.kernels.launch import card_of, choose
found = []
capability = tuple(json.loads(sys.argv[1]))
three, one = GroupShape(4096, ((0, 4096), (4096, 5120), (5120, 6144)), 3), GroupShape(14336, ((0, 4096),), 1)
gated = GroupShape(4096, ((0, 14336), (14336, 28672)), 2)
for num_rows, shape in ((64, three), (2048, three), (1, one), (2048, one), (64, gated), (2048, gated)):
    job = Job(capability, torch.bfloat16, shape, choose(card_of(capability, 58), num_rows, shape))
    found += [kernel.asm["ptx"] for kernel in compile_pair(job)]
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_factors_are_loaded_as_vectors(capability, tmp_path):
    root = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(capability)]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for ptx in json.loads(result.stdout):
        # A and x come by 16-byte asynchronous copies, B and y by 16-byte loads; gain and bias are one row and may be scalars. A small block
        # of the activation has 8 bytes for a thread.
        is_gate = ".globl\tgate_kernel" in ptx
        wide = ptx.count("ld.global.v4.b32") + is_gate * ptx.count("ld.global.v2.b32")
        assert "cp.async.cg.shared.global" in ptx or wide >= 2
        assert is_gate or ptx.count("ld.global.b16") <= 2
    # The biases of two sites, a number for each column that a thread has.
    gates = [ptx.count("ld.global.b16") for ptx in json.loads(result.stdout) if ".globl\tgate_kernel" in ptx]
    assert len(gates) == 2 and gates[0] <= 8 and gates[1] <= 32
    # The activation, and the shrink before it, follow the base's product, not each other alone: two kernels of each gated group.
    num_dependent = sum("griddepcontrol.wait" in ptx for ptx in json.loads(result.stdout))
    assert num_dependent == (3 * 6 if capability >= (9, 0) else 0) and len(json.loads(result.stdout)) == 3 * 6 + 2 * 2

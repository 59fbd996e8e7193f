#!/bin/bash
# Whether this machine can serve: driver, GPU, packages, and a tiny model with an adapter answering through the real server.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
.venv/bin/python - <<'PYTHON'
import importlib, sys, torch
assert torch.cuda.is_available(), "torch sees no GPU"
capability = torch.cuda.get_device_capability()
assert capability >= (8, 9), f"compute capability {capability}; the images are made for 8.9"
for name in ("transformers", "triton", "flashinfer", "server.engine.process", "server.host.agent", "server.host.deliver"):
    importlib.import_module(name)
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, compute capability {capability}", file=sys.stderr)
PYTHON
command -v mount.efs mount.s3files mount.lustre || { echo "no mount helper is installed" >&2; exit 1; }
.venv/bin/python ami/try_server.py --shapes ami/warm-shapes.toml --device cuda tiny

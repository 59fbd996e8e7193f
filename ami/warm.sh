#!/bin/bash
# Compiles what the server would compile at its first start, for this GPU (G6, Gr6, G6e: sm_89), into the folder that manylora.service reads.
#   warm.sh [SHAPE...]     shapes of warm-shapes.toml; all of them by default
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=/var/cache/manylora
mkdir -p "$cache"
# The same folders as in manylora.service.
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor FLASHINFER_WORKSPACE_BASE=$cache
cd "$here/.."
# As it is, then with each option that brings kernels of its own: products of 4-bit weights, attention over keys and values in e4m3.
# Kernels of products are tried for as long as that takes, up to 300 s a start: a start of an instance with this card and one of these
# shapes, with the server's own max-batch-size, has none left to try.
for flags in "" "--flag=--quantize --flag=int4" "--flag=--kv-cache-dtype --flag=fp8"; do
  # shellcheck disable=SC2086 # several words
  .venv/bin/python ami/try_server.py --shapes ami/warm-shapes.toml --device cuda --flag=--kernel-trials-s --flag=300 $flags "$@"
done
! getent passwd manylora >/dev/null || chown -R manylora:manylora "$cache"

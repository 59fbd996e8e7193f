#!/bin/bash
# Installs this archive's server: its source under releases/, its packages under environments/ by the hash of the lock, so that a new release
# with the same packages is there in a second. user-data, the image's recipe and the document that rolls a new version call it. Run again, it
# changes nothing; killed, it leaves no half environment that anybody uses.
#   PREFIX          where to (default /opt/manylora)
#   WHEELHOUSE      folder with wheels, in place of PyPI
#   PYTHON          the interpreter of the environment (3.11 or newer; default python3)
set -euo pipefail

PREFIX=${PREFIX:-/opt/manylora}
WHEELHOUSE=${WHEELHOUSE:-}
PYTHON=${PYTHON:-python3}
release=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# As infra/artifact.py computes it.
lock=$(cat "$release/constraints-gpu.txt" "$release/requirements.txt" "$release/ami/kernels.txt" | sha256sum | cut -c1-16)
environment=$PREFIX/environments/$lock

install_environment() {
    local staging=$environment.part source=()
    rm -rf "$staging"
    mkdir -p "$PREFIX/environments"
    if ! "$PYTHON" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        apt-get -o DPkg::Lock::Timeout=600 -q update
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -q -y install python3-venv
    fi
    if [ -n "$WHEELHOUSE" ]; then
        source=(--no-index --find-links "$WHEELHOUSE")
    fi
    # No copies: the folder is renamed once it is whole, and its scripts are only ever run as `python -m`.
    "$PYTHON" -m venv "$staging"
    local pip=("$staging/bin/python" -m pip --disable-pip-version-check install -q -c "$release/constraints-gpu.txt" "${source[@]}")
    "${pip[@]}" -r "$release/requirements.txt"
    "${pip[@]}" --no-deps -r "$release/ami/kernels.txt"
    "${pip[@]}" -r "$release/ami/kernel-requirements.txt"
    "$staging/bin/python" -m compileall -q "$staging/lib" || true  # a package's own broken example is no reason to fail
    touch "$staging/.complete"
    rm -rf "$environment"
    mv "$staging" "$environment"
}

[ -e "$environment/.complete" ] || install_environment

ln -sfn "$environment" "$release/.venv"
ln -sfn "$release" "$PREFIX/.current.$$"
mv -T "$PREFIX/.current.$$" "$PREFIX/current"
echo "installed $(basename "$release") with environment $lock"

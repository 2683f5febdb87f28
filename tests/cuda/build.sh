#!/usr/bin/env bash
# tests/cuda/build.sh [VENV]: builds and installs the extension with a CUDA torch, then runs tests/cuda/test_fake.py.
# Needs nvcc and, unless VENV already has torch, 12 GB of disk; no GPU. Without VENV nothing is kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venv=$(realpath -m "${1:-$scratch/venv}")
export PIP_DISABLE_PIP_VERSION_CHECK=1

skip() {
  echo "not run: the build with a CUDA torch, because $1"
  exit 0
}

command -v nvcc > "$scratch/nvcc" || skip "there is no nvcc on PATH"
if ! "$venv/bin/python" -c "import torch, pytest" 2> "$scratch/missing"; then
  mkdir -p "$(dirname "$venv")"
  free=$(($(df --output=avail --block-size=1 "$(dirname "$venv")" | tail -1) / 1000000000))
  [ "$free" -ge 12 ] || skip "it needs 12 GB of free disk and $free GB are left"
  echo "== installing a CUDA torch (about 5 GB)"
  "${PYTHON:-python3}" -m venv "$venv"
  TMPDIR="$scratch" "$venv/bin/python" -m pip install --quiet --no-cache-dir \
    torch==2.12.1 "setuptools>=77,<82" wheel ninja numpy pytest
  echo "installed after $SECONDS s"
fi

echo "== building with it"
mkdir "$scratch/tree" # objects and libraries of other builds must neither be taken nor replaced
tar --exclude "*.so" --exclude __pycache__ -c setup.py pyproject.toml README.md LICENSE csrc nystrom_ext tests |
  tar -x -C "$scratch/tree"
start=$SECONDS
FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" "$venv/bin/python" -m pip install --verbose \
  --no-build-isolation --no-deps --force-reinstall "$scratch/tree" > "$scratch/log" 2>&1 ||
  { cat "$scratch/log"; exit 1; }
grep "CPU kernels for" "$scratch/log"
echo "built in $((SECONDS - start)) s"

echo "== running it"
mv "$scratch/tree/tests" "$scratch" # away from the sources: the installed package is meant
cd "$scratch"
"$venv/bin/python" -m pytest -q -p no:cacheprovider tests/cuda/test_fake.py

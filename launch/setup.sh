#!/usr/bin/env bash
# Create .venv with the packages pinned in pyproject.toml; do nothing if it exists and is complete.
#
#   launch/setup.sh            base and dev packages: about 100 seconds and 5 GB
#   GPU=1 launch/setup.sh      adds transformer-engine (compiled: 10 to 20 minutes), or uses that of NVIDIA's container
#   PYTHON=...                 interpreter to create .venv with; by default launch/find_python.sh looks for one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

GPU=${GPU:-0}
VENV_PYTHON=.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

has_cuda_device() { ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L >/dev/null 2>&1 </dev/null; }

# In NVIDIA's container torch and transformer-engine are built for each other and must not be replaced.
brings_transformer_engine() { "$1" -c 'import torch, transformer_engine.pytorch' >/dev/null 2>&1; }

is_container_venv() { grep -qi '^include-system-site-packages *= *true' .venv/pyvenv.cfg 2>/dev/null; }

is_usable_venv() { "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

fingerprint() { # of pyproject.toml, the interpreter and the part ("base" or "gpu")
  { cat pyproject.toml; "$VENV_PYTHON" -VV; echo "$1"; } | "$VENV_PYTHON" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

is_complete() { # part ("base" or "gpu"), then arguments of check_environment.py
  local part=$1
  shift
  [ "$(cat ".venv/.complete-$part" 2>/dev/null)" = "$(fingerprint "$part")" ] || return 1
  "$VENV_PYTHON" launch/check_environment.py "$@"
}

mark_complete() { fingerprint "$1" >".venv/.complete-$1"; }

create_venv() {
  local python
  python=$(launch/find_python.sh) || exit 1
  say "creating .venv with $python"
  rm -rf .venv
  if [ "$GPU" = 1 ] && brings_transformer_engine "$python"; then
    say "using torch and transformer-engine of this container"
    "$python" -m venv --system-site-packages .venv
  else
    "$python" -m venv .venv
  fi
}

install_base() {
  if is_container_venv; then
    "$VENV_PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >.venv/constraints.txt
    "$VENV_PYTHON" launch/check_environment.py --extra dev --without torch --list >.venv/requirements.txt
    "$VENV_PYTHON" -m pip install -c .venv/constraints.txt -r .venv/requirements.txt
    "$VENV_PYTHON" -m pip install --no-deps -e .
  else
    "$VENV_PYTHON" -m pip install -e '.[dev]'
  fi
}

repair() { # pip trusts its records, so a package whose folder was deleted must be reinstalled by force
  "$VENV_PYTHON" launch/check_environment.py "$@" --damaged >.venv/damaged.txt
  [ ! -s .venv/damaged.txt ] || "$VENV_PYTHON" -m pip install --force-reinstall --no-deps -r .venv/damaged.txt
}

# transformer-engine's torch part comes as source. It needs headers of the CUDA toolkit, and of NCCL and cuDNN, which come
# with torch's wheels. Build isolation would download a second torch to compile against.
install_gpu() {
  if "$VENV_PYTHON" -c 'import torch, transformer_engine.pytorch' >/dev/null 2>&1; then
    say "transformer-engine is already installed"
    return
  fi
  local site headers toolkit
  site=$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia
  headers=$site/cu13/include:$site/nccl/include:$site/cudnn/include
  toolkit=${CUDA_HOME:-$(ls -d /usr/local/cuda-13* /usr/local/cuda 2>/dev/null | head -1 || true)}
  [ -n "$toolkit" ] || fail "transformer-engine is compiled against a CUDA 13 toolkit, and /usr/local has none: install" \
    "it, give its path as CUDA_HOME=..., or use NVIDIA's PyTorch container"
  say "compiling transformer-engine with $toolkit: 10 to 20 minutes"
  CUDA_HOME=$toolkit CPATH=$headers${CPATH:+:$CPATH} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    "$VENV_PYTHON" -m pip install --no-build-isolation -e '.[gpu]'
}

[ "$GPU" = 0 ] || [ "$GPU" = 1 ] || fail "GPU=$GPU: give GPU=1 or nothing"
if [ "$GPU" = 1 ] && ! has_cuda_device; then
  fail "GPU=1, but this machine shows no NVIDIA device; transformer-engine would break training on the CPU." \
    "Run it without GPU=1, or on a machine with GPUs"
fi

is_usable_venv || create_venv
without=()
is_container_venv && without=(--without torch)

if ! is_complete base --extra dev ${without[@]+"${without[@]}"}; then
  say "installing the packages of pyproject.toml: about 100 seconds and 5 GB the first time"
  install_base
  repair --extra dev ${without[@]+"${without[@]}"}
  mark_complete base
  say "done; interpreter: $PWD/$VENV_PYTHON"
fi
if [ "$GPU" = 1 ] && ! is_container_venv && ! is_complete gpu --extra gpu; then
  install_gpu
  mark_complete gpu
fi
if [ "$GPU" = 0 ] && ls -d .venv/lib/python3.12/site-packages/transformer_engine >/dev/null 2>&1 && ! has_cuda_device; then
  fail "transformer-engine is installed in .venv, but this machine shows no NVIDIA device; megatron-core would use it and fail." \
    "Remove it: $VENV_PYTHON -m pip uninstall transformer-engine transformer-engine-cu13 transformer-engine-torch"
fi

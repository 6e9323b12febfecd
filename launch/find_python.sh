#!/usr/bin/env bash
# Print the path of a working CPython 3.12, install one if there is none, or fail with a message that says what to do.
# Version managers put shims on PATH for versions that are not installed, so every candidate is run.
#
#   PYTHON=/path/to/python3.12   use exactly this one
#   OBTAIN=0                     never install one
set -uo pipefail

CHECK='
import ensurepip, sys, venv
if sys.implementation.name == "cpython" and sys.version_info[:2] == (3, 12):
    print(sys.executable)
'

works() { # print the real path of candidate $1 if it is a CPython 3.12 with ensurepip and venv
  local path
  path=$(timeout 20 "$1" -I -c "$CHECK" 2>/dev/null) && [ -n "$path" ] && echo "$path"
}

first_working() {
  local candidate
  for candidate in "$@"; do
    works "$candidate" && return 0
  done
  return 1
}

newest_first() { # print the executables among the arguments, highest version first
  local path
  for path in "$@"; do
    [ -x "$path" ] && echo "$path"
  done | sort -rV
}

if [ -n "${PYTHON:-}" ]; then
  works "$PYTHON" && exit 0
  echo "PYTHON=$PYTHON is not a working CPython 3.12 with venv and ensurepip: give another path or unset it" >&2
  exit 1
fi

PYENV_VERSIONS="${PYENV_ROOT:-$HOME/.pyenv}/versions"
UV_VERSIONS="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"
CONDA_PREFIX_HERE="$PWD/.cache/conda-python"

mapfile -t installed < <(newest_first "$PYENV_VERSIONS"/3.12*/bin/python3.12 "$UV_VERSIONS"/cpython-3.12*/bin/python3.12 \
  "$CONDA_PREFIX_HERE"/bin/python3.12 "$HOME"/{miniconda3,miniforge3,anaconda3}/{,envs/*/}bin/python3.12 \
  /opt/conda/{,envs/*/}bin/python3.12 /usr/local/bin/python3.12 /usr/bin/python3.12 /opt/homebrew/bin/python3.12)
first_working python3.12 python3 python ${installed[@]+"${installed[@]}"} && exit 0

obtain() { # run a tool that can install CPython 3.12, with its output on stderr
  echo "no CPython 3.12 found; trying: $*" >&2
  timeout 900 "$@" >&2
}

if [ "${OBTAIN:-1}" = 1 ]; then
  if command -v uv >/dev/null && obtain uv python install 3.12; then
    first_working "$(uv python find --managed-python 3.12 2>/dev/null)" && exit 0
  fi
  if command -v pyenv >/dev/null && obtain pyenv install --skip-existing 3.12; then
    mapfile -t installed < <(newest_first "$PYENV_VERSIONS"/3.12*/bin/python3.12)
    first_working ${installed[@]+"${installed[@]}"} && exit 0
  fi
  for tool in conda mamba micromamba; do
    if command -v "$tool" >/dev/null && obtain "$tool" create --yes --prefix "$CONDA_PREFIX_HERE" python=3.12; then
      first_working "$CONDA_PREFIX_HERE/bin/python3.12" && exit 0
    fi
  done
fi

cat >&2 <<'MESSAGE'
CPython 3.12 with venv and ensurepip is needed (megatron-core 0.19 requires 3.12), and no working one was found. Run
one of
  uv python install 3.12
  pyenv install 3.12
  conda create -n py312 python=3.12
or install your system's packages (Debian, Ubuntu: python3.12 and python3.12-venv), and run this again.
An interpreter elsewhere: PYTHON=/path/to/python3.12 make setup
MESSAGE
exit 1

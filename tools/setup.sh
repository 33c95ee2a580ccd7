#!/usr/bin/env bash
# Make .venv: Python, the pinned packages, this package with its compiled extensions.
#
#   bash tools/setup.sh
#
# Costs nothing when nothing changed. Settings, all optional:
#   PYTHON=python3.12      the interpreter (3.10 to 3.12); the first suitable one on PATH otherwise
#   TORCH=cpu|default      the CPU build of torch, or whatever the package index gives for the
#                          version in constraints.txt; chosen by the machine otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

suitable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if suitable "$candidate"; then echo "$candidate"; return; fi
  done
  fail "needs Python 3.10, 3.11 or 3.12 with venv (Debian: apt install python3-venv); PYTHON=... names one"
}

# Which build of torch: the plain Linux wheel brings gigabytes of CUDA libraries that a machine
# without a GPU has no use for.
torch_build() {
  if [ -n "${TORCH:-}" ]; then
    echo "$TORCH"
  elif [ "$(uname -sm)" = "Linux x86_64" ] && ! nvidia-smi >/dev/null 2>&1; then
    echo cpu
  else
    echo default
  fi
}

install_torch() {
  local version log
  version=$(sed -n 's/^torch==//p' constraints.txt)
  if [ "$(torch_build)" = default ]; then
    pip install "torch==$version"
    return
  fi
  log=$(mktemp)
  if ! pip install "torch==$version+cpu" 2>"$log"; then
    cat "$log" >&2
    rm "$log"
    fail "the CPU build of torch $version could not be installed. If your package index does not hold it, either
  put PyTorch's CPU index (its address is on pytorch.org, Get Started) into PIP_EXTRA_INDEX_URL and run again, or
  take the default build, several GB with CUDA: TORCH=default bash tools/setup.sh"
  fi
  rm "$log"
}

pip() { .venv/bin/python -m pip --disable-pip-version-check "$1" -qq -c constraints.txt "${@:2}"; }

install_packages() {
  say "installing the packages of constraints.txt into .venv (minutes the first time)"
  pip install setuptools wheel pybind11
  install_torch
  # The extensions first, in place: the editable install then finds them built.
  build_extensions
  pip install --no-build-isolation --editable '.[plots,logs,data,dev]'
}

build_extensions() {
  local log source name
  log=$(mktemp)
  say "building the compiled extensions, where they are not up to date"
  .venv/bin/python setup.py --quiet build_ext --inplace >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
  rm "$log"
  for source in megatron_ext/csrc/*.cpp; do
    name=_$(basename "$source" .cpp)
    if ! compgen -G "megatron_ext/$name.*" >/dev/null; then
      say "$name did not compile (is there a C++ compiler?): the slower Python path is used"
    fi
  done
}

# once NAME FUNCTION FILE...: run FUNCTION unless it ran before with the same contents of the files.
once() {
  local stamp=.venv/.setup-$1 state
  state=$(cat -- "${@:3}" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then return; fi
  rm -f "$stamp"
  "$2"
  echo "$state" >"$stamp"
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv
elif [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" --version)" != "$(.venv/bin/python --version)" ]; then
  fail ".venv holds $(.venv/bin/python --version), PYTHON is $("$PYTHON" --version); rm -r .venv to start over"
fi
once packages install_packages pyproject.toml constraints.txt tools/setup.sh
once extensions build_extensions setup.py $(find megatron_ext/csrc -type f | sort)

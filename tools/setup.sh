#!/usr/bin/env bash
# Make .venv: Python, the pinned packages, this package with its compiled extensions.
#
#   bash tools/setup.sh
#
# Costs nothing when nothing changed. Settings, all optional:
#   PYTHON=python3.12      the interpreter (3.10 to 3.12); the first suitable one on PATH otherwise
#   TORCH=cpu|default      the CPU build of torch, or whatever the package index gives for the
#                          version in constraints.txt; chosen by the machine otherwise. Where no
#                          index has the CPU build, the default build is taken.
#   VENV=.venv             the environment's folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

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

# The CPU build from the configured package index, else from PyTorch's own, else the default build:
# where one does not have it the next is tried, so that set-up ends with a working torch.
install_torch() {
  local version
  version=$(sed -n 's/^torch==//p' constraints.txt)
  case $(torch_build) in
    cpu) install_cpu_torch "$version" || install_default_torch "$version" ;;
    default) install_default_torch "$version" ;;
    *) fail "TORCH is '$TORCH'; it takes cpu or default" ;;
  esac
}

install_cpu_torch() {
  local index
  for index in "" "https://download.pytorch.org/whl/cpu"; do
    if pip install --retries 1 --timeout 30 ${index:+--extra-index-url "$index"} "torch==$1+cpu" 2>/dev/null; then return; fi
    say "the CPU build of torch $1 is not to be had from ${index:-the configured package index}"
  done
  return 1
}

# Not quiet: this may take long, and pip shows how far it is.
install_default_torch() {
  say "installing the default build of torch $1 (on Linux with CUDA libraries: about 3 GB to download, 5 GB on disk)"
  "$venv/bin/python" -m pip --disable-pip-version-check install -c constraints.txt "torch==$1" >&2 ||
    fail "torch $1 could not be installed; what pip says is above. The index needs torch $1 for $("$venv/bin/python" --version)
  on $(uname -sm); PIP_INDEX_URL or PIP_FIND_LINKS names another index or a folder of wheels"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$1" -qq -c constraints.txt "${@:2}"; }

install_packages() {
  say "installing the packages of constraints.txt into $venv (minutes the first time)"
  pip install setuptools wheel pybind11
  install_torch
  # The extensions first, in place: the editable install then finds them built.
  build_extensions
  pip install --no-build-isolation --editable '.[plots,logs,data,fast-tokenizers,eval,dev]'
}

build_extensions() {
  local log source name
  log=$(mktemp)
  say "building the compiled extensions, where they are not up to date"
  "$venv/bin/python" setup.py --quiet build_ext --inplace >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
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
  local stamp=$venv/.setup-$1 state
  state=$(cat -- "${@:3}" | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then return; fi
  rm -f "$stamp"
  "$2"
  echo "$state" >"$stamp"
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
elif [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" --version)" != "$("$venv/bin/python" --version)" ]; then
  fail "$venv holds $("$venv/bin/python" --version), PYTHON is $("$PYTHON" --version); rm -r $venv to start over"
fi
once packages install_packages pyproject.toml constraints.txt tools/setup.sh
once extensions build_extensions setup.py $(find megatron_ext/csrc -type f | sort)

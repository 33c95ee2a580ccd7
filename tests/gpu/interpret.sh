#!/usr/bin/env bash
# The Triton kernels on a CPU: formulas, masks and shapes in Triton's interpreter, then compiled for GPUs that need
# not be there. What neither shows is their speed.
#
# Triton (290 MB) goes to build/triton, which nothing else sees. Where it cannot be had this says so and passes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=3.9.0 place=build/triton
if [ ! -d "$place/triton-$version.dist-info" ]; then
  rm -rf "$place" "$place.new"
  timeout "${TRITON_SECONDS:-180}" .venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps \
    --only-binary :all: --target "$place.new" "triton==$version" && mv "$place.new" "$place"
fi
if [ ! -d "$place" ]; then
  echo "tests/gpu/interpret.sh: skipped, Triton $version cannot be had from the package index" >&2
  exit 0
fi
export PYTHONPATH=$PWD/$place TRITON_CACHE_DIR=$PWD/build/triton-cache
TRITON_INTERPRET=1 .venv/bin/python -m pytest -q tests/gpu/test_*triton.py || exit
exec .venv/bin/python -m pytest -q tests/gpu/test_compile_triton.py

#!/usr/bin/env bash
# The tests against a later Megatron-Core than the supported one, in an environment of its own.
#
#   bash tests/core_next.sh                          # make core-next: all suites, one after another
#   bash tests/core_next.sh tests/unit/models        # these paths, and other arguments of pytest
#
# Megatron-Core 0.17 and later need Python 3.12. The environment, .venv-core-next, takes minutes and 6 GB the first
# time: for Python 3.12 the index may hold no CPU build of torch. Not for CI. What fails is listed in the end;
# docs/engine.md lists what is known to differ. The output of each suite goes to runs/core-next.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${CORE_NEXT:-0.19.2}
export VENV=.venv-core-next PYTHON=${PYTHON:-python3.12} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=ignore
results=runs/core-next
mkdir -p "$results"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null ||
  { echo "core-next: megatron-core $version needs Python 3.12; PYTHON=... names one" >&2; exit 1; }
bash tools/setup.sh || exit 1
# Over the supported one, of which this package's metadata speaks; it needs nothing more.
"$VENV/bin/python" -m pip --disable-pip-version-check install -qq --no-deps "megatron-core==$version" 2>/dev/null ||
  { echo "core-next: megatron-core $version cannot be had from the package index" >&2; exit 1; }

# The seams first: nothing else can work without them.
suites=(platform models training kernels checkpoint config data planning arguments benchmarks common inherit interchange
  preprocess tokenizer tools)
suites=("${suites[@]/#/tests/unit/}" tests/distributed)
failed=0
run() {
  echo "== ${*:2}"
  "$VENV/bin/python" -m pytest -q --tb=short --no-header "${@:2}" >"$results/$1.txt" 2>&1 || failed=1
  tail -n 1 "$results/$1.txt"
}
rm -f "$results"/*.txt
if [ $# -gt 0 ]; then
  run chosen "$@"
else
  for suite in "${suites[@]}"; do
    run "$(basename "$suite")" "$suite"
  done
fi
echo "== megatron-core $version: what failed"
grep -hE '^(FAILED|ERROR) ' "$results"/*.txt | tee "$results/failed.list"
exit $failed

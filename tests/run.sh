#!/usr/bin/env bash
# Set up, then check style, import contracts, types and everything that this machine can test.
#
#   bash tests/run.sh [pytest arguments]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh || exit 1
.venv/bin/python -m tests.te.wheels

failed=0
check() {
  printf '== %s\n' "$*"
  ".venv/bin/$@" || failed=1
}
check ruff check --quiet .
check ruff format --quiet --check .
check lint-imports --no-logo
check mypy --no-error-summary
check python -m pytest "$@"
exit $failed

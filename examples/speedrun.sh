#!/usr/bin/env bash
# A row of docs/records.md: train `tiny` to 1.90 bits per byte of held-out text on two cores, with three seeds.
#
#   bash examples/speedrun.sh NAME [flags of pretrain_pangu_pro.py]
#   bash examples/speedrun.sh --try NAME [flags]      # one seed, and add nothing
#
# Everything made lies in runs/speedrun (SPEEDRUN_DIR names another folder); a command that was cut off goes on.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: bash examples/speedrun.sh [--try] NAME [flags of pretrain_pangu_pro.py]" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/laptop.sh"
exec python benchmarks/speedrun.py --work "${SPEEDRUN_DIR:-runs/speedrun}" "$@"

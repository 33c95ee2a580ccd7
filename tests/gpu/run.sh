#!/usr/bin/env bash
# Everything that a GPU can show, in one command: what is here, the tests, then the step benchmark.
#
#   bash tests/gpu/run.sh [pytest arguments]
#
# Says what it leaves out and why. Results go to runs/gpu. SKIP_BENCHMARK=1 runs the tests alone;
# BENCHMARK_ARGS="--shapes 1.5b-pro" passes words to benchmarks/gpu_step.py. On a bare GPU machine (torch,
# megatron-core and Triton) the local layers run in fp32 and bf16; Transformer Engine comes on top.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
export PYTHONWARNINGS=ignore
mkdir -p runs/gpu

echo "== what this machine has"
python tools/doctor.py --speed | tee runs/gpu/doctor.txt

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
  echo "== no GPU: torch sees none, so every test below is skipped and the benchmark is not run"
  exec python -m pytest tests/gpu -rs "$@"
fi

failed=0
echo "== tests on $gpus GPUs; those that need Transformer Engine or another GPU are skipped with the reason"
TEST_DEVICE=cuda python -m pytest tests/gpu -rs "$@" 2>&1 | tee runs/gpu/tests.txt || failed=1

if [ "${SKIP_BENCHMARK:-0}" = 0 ]; then
  echo "== step benchmark at the shapes of 1b-pro and 1.5b-pro (minutes)"
  # shellcheck disable=SC2086
  python benchmarks/gpu_step.py --output runs/gpu/step.json ${BENCHMARK_ARGS:-} | tee runs/gpu/step.txt || failed=1
fi
exit $failed

#!/usr/bin/env bash
# What a GPU can show, in stages of at most ten minutes each.
#
#   bash tests/gpu/run.sh                      # all stages
#   bash tests/gpu/run.sh smoke equality       # some of them, in this order
#
#   smoke      what is here; a few iterations with each kind of layer, saved and continued
#   equality   GPU = CPU, Transformer Engine = local layers, bf16 near fp32, resuming across devices, graphs
#   kernels    the Triton kernels against their formulas
#   bench      tokens/s, MFU and memory at the shape of 1.5b-pro in bf16 (BENCH_SHAPES="1b-pro" for others)
#   fp8        each FP8 recipe that this GPU has: training ends near bf16, and the step's speed
#
# A bare GPU machine is enough: python3 with torch (and Triton). What else the project needs, megatron-core above
# all, is taken from wheels/ or from the package index, and goes to build/gpu-packages. wheels/ is filled elsewhere,
# for that machine's Python: pip download --python-version 3.12 --only-binary :all: --no-deps -d wheels NAME...
# Results are written as they come, to $OUT/gpu if OUT is set, and in the end to runs/gpu.
# GPU_REHEARSAL=1 runs everything on a CPU with the device switched, to check the script: local layers in fp32 stand
# for every run on a GPU, so nothing of Transformer Engine, bf16 or FP8 is rehearsed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
rehearsal=${GPU_REHEARSAL:-0}
stage_seconds=${STAGE_SECONDS:-$([ "$rehearsal" = 1 ] && echo 3600 || echo 570)}
python=python3
[ ! -x .venv/bin/python ] || python=$PWD/.venv/bin/python
results=${OUT:+$OUT/gpu}
export GPU_RESULTS=${results:-$PWD/runs/gpu}
mkdir -p "$GPU_RESULTS" runs/gpu

# A name, and what it is installed as; torch and Triton are the machine's.
needed=(megatron-core==0.16.1 numpy packaging protobuf psutil safetensors sentencepiece tqdm pytest iniconfig pluggy pygments)

missing() {
  "$python" - "${needed[@]}" <<'PY'
import importlib.metadata, sys
for wanted in sys.argv[1:]:
    name, _, version = wanted.partition("==")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or version and found != version:
        print(wanted)
PY
}

bring() {
  export PYTHONPATH=$PWD/build/gpu-packages${PYTHONPATH:+:$PYTHONPATH}
  local lacking name
  mapfile -t lacking < <(missing)
  [ ${#lacking[@]} -gt 0 ] || return 0
  echo "== bringing ${lacking[*]}"
  local pip=("$python" -m pip --disable-pip-version-check install -q --no-deps --target build/gpu-packages)
  for name in "${lacking[@]}"; do "${pip[@]}" --no-index --find-links wheels "$name" 2>/dev/null; done
  mapfile -t lacking < <(missing)
  [ ${#lacking[@]} -eq 0 ] || timeout 120 "${pip[@]}" "${lacking[@]}"
  mapfile -t lacking < <(missing)
  [ ${#lacking[@]} -eq 0 ] || { echo "cannot be had here: ${lacking[*]}; put their wheels into wheels/" >&2; exit 1; }
}

# within NAME COMMAND...: its output on the screen and line by line in NAME.txt, ended after the stage's time.
within() {
  local name=$1
  shift
  timeout --kill-after 10 "$stage_seconds" "$@" 2>&1 | tee "$GPU_RESULTS/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" != 124 ] || echo "== $name: its time is over, what was measured is in $GPU_RESULTS"
  return "$code"
}
tests() { within "$1" "$python" -m pytest -v -rs --durations=0 "${@:2}"; }
bench() {
  local options=(--steps 10 --warm-up 3)
  [ "$rehearsal" = 0 ] || options=(--steps 2 --warm-up 1 --device cpu --shapes tiny --precisions fp32 --impls local
    --micro-batch-size 2 --micro-batches 1)
  within "$1" "$python" benchmarks/gpu_step.py --output "$GPU_RESULTS/$1.json" --seconds $((stage_seconds - 60)) \
    "${@:2}" "${options[@]}"
}

stage_smoke() {
  within doctor "$python" tools/doctor.py --speed
  tests smoke tests/gpu/test_smoke.py
}
stage_equality() { tests equality tests/gpu/test_traces.py -k "not fp8"; }
stage_kernels() { tests kernels tests/gpu/test_*triton.py; }
# shellcheck disable=SC2086
stage_bench() { bench bench --shapes ${BENCH_SHAPES:-1.5b-pro} --precisions bf16; }
stage_fp8() {
  local failed=0 half=$((stage_seconds / 2))
  stage_seconds=$half tests fp8 tests/gpu/test_traces.py -k fp8 || failed=1
  stage_seconds=$half bench fp8-bench --shapes 1.5b-pro --precisions bf16 fp8 --impls transformer_engine \
    --contenders "pi on" || failed=1
  return $failed
}

stages=(smoke equality kernels bench fp8)
for stage in "$@"; do
  [[ " ${stages[*]} " == *" $stage "* ]] || { echo "no stage $stage, there are: ${stages[*]}" >&2; exit 2; }
done
bring
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 1
if [ "$gpus" = 0 ] && [ "$rehearsal" = 0 ]; then
  echo "torch sees no GPU here; GPU_REHEARSAL=1 runs the stages on a CPU" >&2
  exit 1
fi
[ "$gpus" = 0 ] || export TEST_DEVICE=cuda
failed=()
[ $# -gt 0 ] || set -- "${stages[@]}"
for stage in "$@"; do
  echo "== $stage"
  "stage_$stage" || failed+=("$stage")
done
[ "$GPU_RESULTS" -ef runs/gpu ] || cp -r "$GPU_RESULTS/." runs/gpu/
if [ ${#failed[@]} -gt 0 ]; then
  echo "== failed: ${failed[*]}; everything is in $GPU_RESULTS"
  exit 1
fi
echo "== passed; everything is in $GPU_RESULTS"

# What the run_*.sh scripts share: where to run, and how to start, check or shrink a run.
#
# Settings from the environment, with Megatron-LM's names: GPUS_PER_NODE (the GPUs that are here; 2 processes
# where there are none), NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. DRY_RUN=1 starts nothing, SMOKE=1
# trains a narrowed model for ten iterations; both together check the narrowed command.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$HERE/.venv" ] || export PATH="$HERE/.venv/bin:$PATH"

NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
DRY_RUN=${DRY_RUN:-0}
SMOKE=${SMOKE:-0}

GPUS_HERE=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
if [ "$DRY_RUN" = 1 ] && [ "$SMOKE" = 0 ]; then
  # The command is for a GPU node, wherever it is checked.
  GPUS_PER_NODE=${GPUS_PER_NODE:-8}
elif [ "$GPUS_HERE" = 0 ]; then
  GPUS_PER_NODE=${GPUS_PER_NODE:-2}
else
  GPUS_PER_NODE=${GPUS_PER_NODE:-$GPUS_HERE}
fi
# With one queue to the GPU, communication starts in the order in which tensor parallel layers ask for it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# One thread a process: several would fight for the cores, and a GPU run leaves little to the CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Megatron-Core warns at every import, in every process, of each package that it could use and does not find.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning}

# What SMOKE=1 changes, and nothing else; a flag that is given twice counts as it is given last.
SMOKE_ARGS=(
  --num-layers 2
  --hidden-size 128
  --num-attention-heads 2
  --ffn-hidden-size 256
  --seq-length 64
  --micro-batch-size 1
  --global-batch-size 8
  --train-iters 10
  --save-interval 10
  --eval-interval 10
  --eval-iters 1
  --log-interval 1
)

# launch FLAG...: start pretrain_pangu_pro.py with the flags on the processes of DISTRIBUTED_ARGS.
launch() {
  local flags=("$@") machine=${MACHINE:-h100}
  if [ "$SMOKE" = 1 ]; then
    flags+=("${SMOKE_ARGS[@]}")
    [ "$GPUS_HERE" != 0 ] || machine=cpu
  fi
  if [ "$DRY_RUN" = 1 ]; then
    printf 'torchrun'
    printf ' %q' "${DISTRIBUTED_ARGS[@]}" "$HERE/pretrain_pangu_pro.py" "${flags[@]}"
    printf '\n\n'
    exec python "$HERE/tools/plan_run.py" --world-size $((NUM_NODES * GPUS_PER_NODE)) --machine "$machine" \
      --check-files -- "${flags[@]}"
  fi
  exec torchrun "${DISTRIBUTED_ARGS[@]}" "$HERE/pretrain_pangu_pro.py" "${flags[@]}"
}

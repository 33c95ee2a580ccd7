#!/usr/bin/env bash
# PanGu-pi-1.5B Pro as arXiv 2402.02791 trains it, on one node with 8 GPUs or on many.
#
#   bash examples/run_1.5b.sh CHECKPOINT_PATH TENSORBOARD_PATH TOKENIZER DATA [DATA...]
#   DRY_RUN=1 bash examples/run_1.5b.sh checkpoints tensorboard MOCK MOCK   # check the command, start nothing
#   SMOKE=1 bash examples/run_1.5b.sh checkpoints tensorboard MOCK MOCK     # ten iterations of a narrowed model
#
# TOKENIZER is a SentencePiece model (tools/compress_tokenizer.py makes one of 48,000 pieces), DATA a prefix or a
# blend 'weight prefix weight prefix'; the word MOCK takes made-up tokens. The same command goes on from the last
# checkpoint. Several nodes: see examples/common.sh, and examples/slurm for SLURM.
# INITIAL_CHECKPOINT=FOLDER starts from inherited weights, ROUND_INDEX=FILE trains on a round's samples
# (docs/rounds.md), FP8=1 computes in FP8 (Transformer Engine).
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: bash examples/run_1.5b.sh CHECKPOINT_PATH TENSORBOARD_PATH TOKENIZER|MOCK DATA|MOCK [DATA...]" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
CHECKPOINT_PATH=$1
TENSORBOARD_PATH=$2
TOKENIZER=$3
DATA=("${@:4}")

DISTRIBUTED_ARGS=(
  --nproc-per-node "$GPUS_PER_NODE"
  --nnodes "$NUM_NODES"
  --node-rank "$NODE_RANK"
  --master-addr "$MASTER_ADDR"
  --master-port "$MASTER_PORT"
)

# 22 layers of 2048 channels, 16 heads, FFN 6912; both PanGu-pi modules on.
MODEL_ARGS=(
  --model-preset pangu-pi-1.5b-pro
)

# A batch of 1024 x 2048 = 2.1M tokens; 1.6T tokens are 762,939 batches. Learning rate and batch are those that
# third-party notes on the paper give; warm-up, betas, decay and clipping are those of its released script.
TRAINING_ARGS=(
  --micro-batch-size 4
  --global-batch-size 1024
  --train-iters "${TRAIN_ITERS:-762939}"
  --lr 2e-4
  --min-lr 2e-5
  --lr-decay-style cosine
  --lr-warmup-fraction 0.03
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --clip-grad 1.0
  --bf16
  --seed 1234
)
[ "${FP8:-0}" = 0 ] || TRAINING_ARGS+=(
  --transformer-impl transformer_engine
  --fp8-format hybrid
  --fp8-recipe tensorwise
  --first-last-layers-bf16
  --fp8-param-gather
)

[ -z "${ROUND_INDEX:-}" ] || TRAINING_ARGS+=(--round-index "$ROUND_INDEX")

# A model of this size fits a device: every device takes its own part of the batch (docs/scaling.md).
MODEL_PARALLEL_ARGS=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

DATA_ARGS=(
  --num-workers 2
)
if [ "$TOKENIZER" = MOCK ]; then
  DATA_ARGS+=(--tokenizer-type NullTokenizer --vocab-size 47999)
else
  DATA_ARGS+=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER")
fi
if [ "${DATA[0]}" = MOCK ]; then
  DATA_ARGS+=(--mock-data)
else
  DATA_ARGS+=(--data-path "${DATA[@]}" --split 998,2,0 --data-cache-path "$CHECKPOINT_PATH/data-cache")
fi

EVAL_AND_LOGGING_ARGS=(
  --log-interval 10
  --log-throughput
  --log-progress
  --eval-interval 1000
  --eval-iters 10
  --save "$CHECKPOINT_PATH"
  --load "$CHECKPOINT_PATH"
  --save-interval 1000
  --tensorboard-dir "$TENSORBOARD_PATH"
  --metrics-file "$CHECKPOINT_PATH/metrics.jsonl"
)
[ -z "${INITIAL_CHECKPOINT:-}" ] || EVAL_AND_LOGGING_ARGS+=(--pretrained-checkpoint "$INITIAL_CHECKPOINT")

launch \
  "${MODEL_ARGS[@]}" \
  "${TRAINING_ARGS[@]}" \
  "${MODEL_PARALLEL_ARGS[@]}" \
  "${DATA_ARGS[@]}" \
  "${EVAL_AND_LOGGING_ARGS[@]}"

#!/usr/bin/env bash
# Parameter inheritance from end to end on a laptop: train a source model, compress its tokenizer, cut a target
# of half its size out of it by each criterion, train each target for the same tokens beside one that starts
# from random weights, and draw all curves in one plot.
#
#   bash examples/inherit_then_train.sh
#   INHERIT_DATA=my.jsonl.gz bash examples/inherit_then_train.sh     # your text: {"text": "..."} per line
#
# Everything made lies in runs/inherit (INHERIT_DIR names another folder). Run again, it goes on where it was;
# rm -r runs/inherit starts over. It computes for about 12 minutes on one core. SOURCE_ITERS (400), TARGET_ITERS (60)
# and MASK_STEPS (60) set the lengths, CRITERIA what is compared; with 10, 3 and 2, too short to learn, all of it
# takes two minutes. benchmarks/inherit.py is the same with several seeds.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/laptop.sh"

run=${INHERIT_DIR:-runs/inherit}
source_iters=${SOURCE_ITERS:-400}
target_iters=${TARGET_ITERS:-60}
mask_steps=${MASK_STEPS:-60}
read -ra criteria <<<"${CRITERIA:-random l1 l2 taylor learned}"
mkdir -p "$run"

step "1/6 corpus"
corpus=${INHERIT_DATA:-$run/corpus.jsonl}
case $corpus in /*) ;; "$run"/*) ;; *) corpus=$started_in/$corpus ;; esac
[ -f "$corpus" ] || python tools/make_demo_corpus.py --output "$corpus"
echo "$corpus"

step "2/6 two tokenizers, the second compressed from the first, and the dataset of each"
[ -f "$run/source.model" ] ||
  python tools/train_tokenizer.py --input "$corpus" --vocab-size 4096 --sample-mb 4 --output "$run/source.model"
[ -f "$run/target.model" ] ||
  python tools/compress_tokenizer.py --input "$corpus" --tokenizer-model "$run/source.model" \
    --vocab-size 2560 --output "$run/target"
for who in source target; do
  [ -f "$run/${who}_text_document.idx" ] ||
    python tools/preprocess_data.py --input "$corpus" --output-prefix "$run/$who" --append-eod \
      --tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/$who.model"
done

MODEL_ARGS=(
  --kv-channels 32
  --group-query-attention
  --position-embedding-type rope
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
  --series-activation-order 2
  --augmented-shortcuts 1
  --augmented-shortcut-reduction 32
)
SOURCE_SHAPE=(--num-layers 8 --hidden-size 192 --ffn-hidden-size 576 --num-attention-heads 6 --num-query-groups 3)
TARGET_SHAPE=(--num-layers 6 --hidden-size 128 --ffn-hidden-size 448 --num-attention-heads 4 --num-query-groups 2)
TRAINING_ARGS=(
  --seq-length 256
  --max-position-embeddings 256
  --micro-batch-size 8
  --split 98,2,0
  --data-cache-path "$run/cache"
  --tokenizer-type SentencePieceTokenizer
  --lr-decay-style cosine
  --weight-decay 0.1
  --adam-beta2 0.95
  --log-interval 20
  --eval-iters 16
  --save-interval 200
)

# train NAME WHO ITERATIONS FLAG...: into RUN/NAME and RUN/NAME.jsonl, unless it has been.
train() {
  local name=$1 who=$2 iterations=$3
  if [ "$(cat "$run/$name/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$iterations" ]; then
    echo "$name: trained already"
    return
  fi
  python pretrain_pangu_pro.py "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" \
    --data-path "$run/${who}_text_document" --tokenizer-model "$run/$who.model" \
    --train-iters "$iterations" --save "$run/$name" --load "$run/$name" --metrics-file "$run/$name.jsonl" "${@:4}"
}

step "3/6 the source: $source_iters iterations"
train source source "$source_iters" "${SOURCE_SHAPE[@]}" --lr 2e-3 --min-lr 2e-4 --lr-warmup-fraction 0.05 \
  --eval-interval 100

step "4/6 a target from random weights: $target_iters iterations"
FINE_ARGS=(--lr 1e-3 --min-lr 1e-4 --lr-warmup-fraction 0.05 --eval-interval $(((target_iters + 2) / 3)))
train from_random_weights target "$target_iters" "${TARGET_SHAPE[@]}" "${FINE_ARGS[@]}"

step "5/6 the same target, inherited by ${criteria[*]}"
curves=("$run/from_random_weights.jsonl")
for criterion in "${criteria[@]}"; do
  start=$run/start_$criterion
  [ -f "$start/inheritance/report.json" ] ||
    python tools/inherit_checkpoint.py --load "$run/source" --save "$start" \
      --tokenizer-model "$run/source.model" --target-tokenizer-model "$run/target.model" \
      --target-num-layers 6 --target-hidden-size 128 --target-ffn-hidden-size 448 --target-num-query-groups 2 \
      --depth-policy importance --width-criterion "$criterion" \
      --data-path "$run/target_text_document" --data-cache-path "$run/cache" --seq-length 256 --mask-steps "$mask_steps"
  train "from_$criterion" target "$target_iters" "${TARGET_SHAPE[@]}" "${FINE_ARGS[@]}" \
    --pretrained-checkpoint "$start"
  curves+=("$run/from_$criterion.jsonl")
done

step "6/6 all curves"
picture tools/plot_metrics.py "${curves[@]}" --x consumed_tokens --output "$run/curves.png"
python - "$run" random_weights "${criteria[@]}" <<'PYTHON'
import json, sys

run, names = sys.argv[1], sys.argv[2:]
print("\nbits per byte")
print(f"{'start from':<16}{'training text, at the start':>28}{'held-out text, at the end':>28}")
for name in names:
    records = [json.loads(line) for line in open(f"{run}/from_{name}.jsonl", encoding="utf-8")]
    end = [r["bits_per_byte"] for r in records if r.get("split") == "validation"][-1]
    start = "-"
    if name != "random_weights":
        with open(f"{run}/start_{name}/inheritance/report.json", encoding="utf-8") as file:
            start = f"{json.load(file)['loss_after']['bits_per_byte']:.3f}"
    print(f"{name:<16}{start:>28}{end:>28.3f}")
print(f"\nlook at     {run}/curves.png, {run}/start_*/inheritance/report.png")
print("expected    every inherited start ends well below random weights")
PYTHON

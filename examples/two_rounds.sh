#!/usr/bin/env bash
# Two rounds of training on a CPU, in minutes: train, measure the loss of every sample with the frozen model,
# draw half of them by softmax of the loss, train on these, and see what was forgotten before and after.
#
#   bash examples/two_rounds.sh
#   TWO_ROUNDS_DATA=my.jsonl.gz bash examples/two_rounds.sh     # your text: {"text": "..."} per line
#
# Everything made lies in runs/two_rounds (TWO_ROUNDS_DIR names another folder). Run again, it goes on where it
# was. TWO_ROUNDS_ITERS sets the length of round 1 (300 iterations); PROCESSES the number of processes (2).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/laptop.sh"

run=${TWO_ROUNDS_DIR:-runs/two_rounds}
iterations=${TWO_ROUNDS_ITERS:-300}
processes=${PROCESSES:-2}
batch=16
mkdir -p "$run"

step "1/6 corpus, tokenizer, dataset"
corpus=${TWO_ROUNDS_DATA:-}
case $corpus in '') corpus=$run/corpus.jsonl ;; /*) ;; *) corpus=$started_in/$corpus ;; esac
[ -f "$corpus" ] || python tools/make_demo_corpus.py --output "$corpus"
TOKENIZER_ARGS=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/tokenizer.model")
[ -f "$run/tokenizer.model" ] ||
  python tools/train_tokenizer.py --input "$corpus" --vocab-size 4096 --sample-mb 4 --output "$run/tokenizer.model"
[ -f "$run/corpus_text_document.idx" ] ||
  python tools/preprocess_data.py --input "$corpus" --output-prefix "$run/corpus" \
    "${TOKENIZER_ARGS[@]}" --append-eod --workers 2

# The data, its seed and the length of round 1 decide which sample has which number: they stay the same when the
# losses are recorded, and round 2 is refused with others (docs/rounds.md).
MODEL_ARGS=(--model-preset tiny)
DATA_ARGS=(
  --data-path "$run/corpus_text_document"
  --split 98,2,0
  --data-cache-path "$run/cache"
  --seed 1234
  "${TOKENIZER_ARGS[@]}"
)
TRAINING_ARGS=(
  --micro-batch-size $((batch / processes))
  --global-batch-size "$batch"
  --lr 3e-3
  --min-lr 3e-4
  --lr-decay-style cosine
  --lr-warmup-fraction 0.05
  --weight-decay 0.1
  --adam-beta2 0.95
  --eval-iters 8
  --log-interval 10
)
pretrain() {
  torchrun --standalone --nproc-per-node "$processes" pretrain_pangu_pro.py \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "$@"
}
trained_to() { [ "$(cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$2" ]; }
# The losses of all samples of round 1, with the frozen model in folder $1.
record() { pretrain --train-iters "$iterations" --load "$1" --record-sample-loss "$1/losses.npy"; }

step "2/6 round 1: $iterations iterations"
trained_to "$run/round1" "$iterations" ||
  pretrain --train-iters "$iterations" --save "$run/round1" --load "$run/round1" --save-interval 100 \
    --metrics-file "$run/round1.jsonl"

step "3/6 losses of round 1's samples"
record "$run/round1"
picture tools/plot_forgetting.py "$run/round1/losses.npy" --output "$run/forgetting1.png"

step "4/6 half of the batches, drawn by softmax of their loss"
python tools/build_round.py --losses "$run/round1/losses.npy" --rate 0.5 --group-size "$batch" \
  --output "$run/round2.npy"
selected=$(python -c "import json; print(json.load(open('$run/round2.json'))['selected'])")

step "5/6 round 2: one epoch over the $selected samples, from the weights of round 1"
trained_to "$run/round2" $((selected / batch)) ||
  pretrain --train-iters $((selected / batch)) --round-index "$run/round2.npy" \
    --pretrained-checkpoint "$run/round1" --save "$run/round2" --load "$run/round2" --save-interval 100 \
    --metrics-file "$run/round2.jsonl"

step "6/6 what is remembered now"
record "$run/round2"
picture tools/plot_forgetting.py "$run/round1/losses.npy" "$run/round2/losses.npy" --output "$run/forgetting2.png"

python - "$run" <<'PYTHON'
import json, sys
run = sys.argv[1]
def valid(name):
    records = [json.loads(line) for line in open(f"{run}/{name}.jsonl", encoding="utf-8")]
    return [record for record in records if record.get("split") == "validation"][-1]
def mean(name):
    return json.load(open(f"{run}/{name}/losses.json", encoding="utf-8"))["mean_loss"]
print("\n== Summary\nafter    validation loss   bits per byte   loss on round 1's samples")
for name in ("round1", "round2"):
    print(f"{name}   {valid(name)['lm_loss']:15.4f} {valid(name)['bits_per_byte']:15.4f} {mean(name):27.4f}")
print(f"look at  {run}/round2.png (what was drawn), {run}/forgetting2.png\nstart over  rm -r {run}")
PYTHON

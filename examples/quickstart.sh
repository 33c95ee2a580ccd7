#!/usr/bin/env bash
# From nothing to a language model that has learned real text, on a CPU, in minutes:
# set-up, corpus, tokenizer, dataset, tensor-parallel training, loss curve, sample.
#
#   bash examples/quickstart.sh
#   QUICKSTART_DATA=my.jsonl.gz bash examples/quickstart.sh     # your text: {"text": "..."} per line
#
# Everything made lies in runs/quickstart (QUICKSTART_DIR names another folder). Run again, it goes on
# where it was; rm -r runs/quickstart starts over. QUICKSTART_ITERS sets the length (400 iterations).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/laptop.sh"

run=${QUICKSTART_DIR:-runs/quickstart}
iterations=${QUICKSTART_ITERS:-400}

mkdir -p "$run"
source=${QUICKSTART_DATA:-built-in corpus}
case ${QUICKSTART_DATA:-/} in /*) ;; *) source=$started_in/$QUICKSTART_DATA ;; esac
if [ "$(cat "$run/source" 2>/dev/null || echo "$source")" != "$source" ]; then
  echo "quickstart: $run was made from $(cat "$run/source"); rm -r $run to start over" >&2
  exit 1
fi
echo "$source" >"$run/source"

step "1/6 corpus"
if [ -n "${QUICKSTART_DATA:-}" ]; then
  corpus=$source
else
  corpus=$run/corpus.jsonl
  [ -f "$corpus" ] || python tools/make_demo_corpus.py --output "$corpus"
fi
echo "$corpus"

step "2/6 tokenizer"
TOKENIZER_ARGS=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/tokenizer.model")
[ -f "$run/tokenizer.model" ] ||
  python tools/train_tokenizer.py --input "$corpus" --vocab-size 4096 --sample-mb 4 --output "$run/tokenizer.model"
echo "$run/tokenizer.model"

step "3/6 dataset"
[ -f "$run/corpus_text_document.idx" ] ||
  python tools/preprocess_data.py --input "$corpus" --output-prefix "$run/corpus" \
    "${TOKENIZER_ARGS[@]}" --append-eod --workers 2
python tools/inspect_dataset.py --input "$run/corpus_text_document"

documents=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["documents"])' "$run/corpus_text_document.json")
if [ "$documents" -lt 2 ]; then
  echo "quickstart: $corpus holds $documents document, and one more is needed to validate on: cut the text into" \
    "several (a line {\"text\": ...} each), then rm -r $run" >&2
  exit 1
fi
split=98,2,0
[ "$documents" -ge 50 ] || split=$((documents - 1)),1,0 # shares are taken in whole documents

step "4/6 training: $iterations iterations, tensor parallel on 2 processes"
MODEL_ARGS=(--model-preset tiny)
PARALLEL_ARGS=(--tensor-model-parallel-size 2)
DATA_ARGS=(
  --data-path "$run/corpus_text_document"
  --split "$split"
  --data-cache-path "$run/cache"
  "${TOKENIZER_ARGS[@]}"
)
TRAINING_ARGS=(
  --micro-batch-size 8
  --global-batch-size 16
  --train-iters "$iterations"
  --lr 3e-3
  --min-lr 3e-4
  --lr-decay-style cosine
  --lr-warmup-fraction 0.05
  --weight-decay 0.1
  --adam-beta2 0.95
)
LOGGING_ARGS=(
  --log-interval 10
  --log-throughput
  --eval-interval 50
  --eval-iters 8
  --save "$run/checkpoints"
  --load "$run/checkpoints"
  --override-opt_param-scheduler # a larger QUICKSTART_ITERS goes on
  --save-interval 100
  --metrics-file "$run/metrics.jsonl"
  --tensorboard-dir "$run/tensorboard"
)
if [ "$(cat "$run/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$iterations" ]; then
  echo "already trained to iteration $iterations; rm -r $run to start over"
else
  torchrun --standalone --nproc-per-node 2 pretrain_pangu_pro.py \
    "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOGGING_ARGS[@]}"
fi

step "5/6 loss curve"
picture tools/plot_metrics.py "$run/metrics.jsonl" --output "$run/loss.png" --terminal

step "6/6 sample: the model continues the beginning of a document that it was not trained on"
prompt=$(python - "$corpus" <<'PYTHON'
import gzip, json, sys
path = sys.argv[1]
with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
    for line in lines:
        last = line if line.strip() else last
print(" ".join(json.loads(last)["text"].split())[:40])
PYTHON
)
python tools/generate_text.py --load "$run/checkpoints" --prompt "$prompt" --max-new-tokens 80 \
  | tee "$run/sample.txt"

python - "$run" <<'PYTHON'
import json, sys
run = sys.argv[1]
records = [json.loads(line) for line in open(f"{run}/metrics.jsonl", encoding="utf-8")]
start = next(r["lm_loss"] for r in records if "split" not in r)
end = [r for r in records if r.get("split") == "validation"][-1]
learned = end["lm_loss"] < 0.8 * start
print(f"""
== Summary
expected  loss starts at about ln(4096) = 8.3; the validation loss ends well below, under {0.8 * start:.2f}
came      training started at {start:.3f}; validation ended at {end["lm_loss"]:.3f}, {end["bits_per_byte"]:.3f} bits per byte
look at   {run}/loss.png, {run}/sample.txt, tensorboard --logdir {run}/tensorboard
go on     python tools/generate_text.py --load {run}/checkpoints --prompt "..."
start over  rm -r {run}""")
sys.exit(0 if learned else "quickstart: the model did not learn as expected; please report this with the log")
PYTHON

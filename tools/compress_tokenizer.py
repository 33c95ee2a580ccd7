#!/usr/bin/env python3
"""A SentencePiece model -> one of exactly --vocab-size pieces, chosen for a corpus.

    python tools/compress_tokenizer.py --input train_*.jsonl.gz --workers 2 --tokenizer-model big.model \\
        --vocab-size 48000 --output compact --validation valid_*.jsonl.gz --report report

Every id of the corpus is counted with the full model. A BPE vocabulary then shrinks from its leaves, so that
every piece left can still be produced, and by the pieces that lengthen the counted text least; a unigram
vocabulary keeps its most frequent pieces, with new scores. Byte, control, user-defined and unknown pieces
stay. Order and scores of BPE pieces stay as they were.

Writes OUTPUT.model, OUTPUT.vocab, OUTPUT.idmap.npz and .json (old id -> new id, for inheritance),
OUTPUT.counts.npz (counts, to be used again or merged with others through --counts) and OUTPUT_hf/, a Hugging
Face tokenizer folder, which is left out, with the reason, where transformers cannot give the model's ids.
--report DIR adds report.md, report.json and report.png.

Exit code 0: everything is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.config.presets import PRESETS
from megatron_ext.tokenizer.compress_run import compress


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument("--input", nargs="+", default=[], metavar="FILE", help="JSON lines: files, globs, folders")
    p.add_argument("--json-key", default="text", help="key of the text in each line (default text)")
    p.add_argument(
        "--on-bad-line",
        choices=["stop", "skip"],
        default="stop",
        help="a line that is not UTF-8, not JSON, or has no text: stop (default), or leave it out",
    )
    p.add_argument(
        "--dataset", nargs="+", default=[], metavar="PREFIX", help=".bin/.idx made with the full model"
    )
    p.add_argument("--counts", nargs="+", default=[], metavar="FILE", help="counts that earlier runs saved")
    p.add_argument("--tokenizer-model", required=True, metavar="FILE", help="the full SentencePiece model")
    p.add_argument(
        "--vocab-size", type=int, metavar="V", help="pieces of the new model; without it, only count"
    )
    p.add_argument("--output", required=True, metavar="PREFIX", help="OUTPUT.model and so on")
    p.add_argument("--drop-fillers", action="store_true", help="let unused fillers (<TOKENS_UNUSED_n>) go")
    p.add_argument("--workers", type=int, default=1, help="processes that count text (default 1)")
    p.add_argument(
        "--validation", nargs="+", default=[], metavar="FILE", help="held-out JSON lines for the report"
    )
    p.add_argument("--report", metavar="DIR", help="write report.md, report.json, report.png")
    p.add_argument(
        "--model-preset", default="pangu-pi-1b-pro", help="whose share of embedding and head is shown"
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


def problems(args: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the combination of flags."""
    found = []
    if not (args.input or args.dataset or args.counts):
        found.append("nothing to count: give --input, --dataset or --counts")
    if args.vocab_size is not None and args.vocab_size < 1:
        found.append("--vocab-size must be 1 or more")
    if args.workers < 1:
        found.append("--workers must be 1 or more")
    if args.vocab_size is None and args.report:
        found.append("--report needs --vocab-size")
    if args.vocab_size is None and args.drop_fillers:
        found.append("--drop-fillers needs --vocab-size")
    if args.validation and not args.report:
        found.append("--validation needs --report")
    if args.model_preset not in PRESETS:
        found.append(f"--model-preset {args.model_preset}: not one of {', '.join(PRESETS)}")
    return found


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if found := problems(args):
        arguments.error("; ".join(found))
    summary = compress(args)
    print(json.dumps(summary) if args.json else "\n".join(f"{k}: {v}" for k, v in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

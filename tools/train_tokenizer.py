#!/usr/bin/env python3
"""Train a SentencePiece BPE tokenizer on the text of JSON Lines or parquet.

    python tools/train_tokenizer.py --input train.jsonl --vocab-size 4096 --output my.model

Byte fallback, digits one by one, no normalisation: decoding gives a text back, with one exception, U+2581,
which is sentencepiece's own sign for a blank and comes back as one. Use the model with
--tokenizer-type SentencePieceTokenizer --tokenizer-model my.model.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.tokenizer.train import train_tokenizer


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 0 < args.sample_mb < math.inf:
        parser.error(f"--sample-mb {args.sample_mb}: must be above 0")
    start = time.monotonic()
    if not args.json:
        print(f"learning {args.vocab_size} pieces from {', '.join(args.input)}", flush=True)
    sample = train_tokenizer(
        args.input,
        args.output,
        args.vocab_size,
        key=args.json_key,
        sample_bytes=int(args.sample_mb * 1e6),
        seed=args.seed,
        on_bad_line=args.on_bad_line,
    )
    seconds = time.monotonic() - start
    facts = vars(sample) | {"left_out": sample.left_out.count}
    summary = {"output": str(args.output), "vocab_size": args.vocab_size, "seconds": seconds} | facts
    if sample.left_out.count:
        print(sample.left_out, file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"wrote {args.output}: {args.vocab_size} pieces from {sample.text_bytes_used / 1e6:.1f} of "
            f"{sample.text_bytes / 1e6:.1f} MB of text, in {seconds:.1f} s"
        )
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help=".jsonl (also .gz, .zst, .xz, .bz2) and .parquet files"
    )
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, with 3 specials and 256 bytes")
    parser.add_argument("--json-key", default="text", help="key or column of the text (default: text)")
    parser.add_argument(
        "--on-bad-line",
        choices=["stop", "skip"],
        default="stop",
        help="a line or row that is not UTF-8, not JSON, or has no text: stop (default), or leave it out",
    )
    parser.add_argument(
        "--sample-mb", type=float, default=10.0, help="text to learn from, in MB (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the sample (default: 1234)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())

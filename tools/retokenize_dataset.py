#!/usr/bin/env python3
"""A .bin/.idx dataset with the ids of one tokenizer -> the same documents with those of another.

    python tools/retokenize_dataset.py --input data/old --output-prefix data/new \\
        --old-tokenizer-model big.model --new-tokenizer-model compact.model

A tokenizer is a SentencePiece file or a Hugging Face folder. The text itself is not needed: ids are turned
back into bytes and encoded again. Special tokens such as <s> are translated by their names, and the one that
ends documents to the new tokenizer's. Documents and sequences stay as they are.

Exit code 0: everything is in place; 1: bad input; 2: bad usage.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.preprocess.retokenize import retokenize
from megatron_ext.tokenizer.encoding import BACKENDS


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = command.parser(__doc__)
    p.add_argument("--input", required=True, metavar="PREFIX", help="dataset of the old tokenizer")
    p.add_argument("--old-tokenizer-model", required=True, metavar="PATH")
    p.add_argument("--new-tokenizer-model", required=True, metavar="PATH")
    p.add_argument(
        "--tokenizer-backend",
        choices=BACKENDS,
        default="auto",
        help="what encodes with a new Hugging Face tokenizer: the fastest library that gives its ids "
        "(default), or Hugging Face's own alone",
    )
    p.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    args = p.parse_args(argv)
    models = (args.old_tokenizer_model, args.new_tokenizer_model)
    summary = retokenize(args.input, *models, args.output_prefix, args.tokenizer_backend)
    print(json.dumps(summary) if args.json else "\n".join(f"{k}: {v:,}" for k, v in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

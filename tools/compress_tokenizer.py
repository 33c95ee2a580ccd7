#!/usr/bin/env python3
"""A tokenizer -> one of exactly --vocab-size ids, chosen for a corpus.

    python tools/compress_tokenizer.py --input train_*.jsonl.gz --workers 2 --tokenizer-model big.model \\
        --vocab-size 48000 --output compact --validation valid_*.jsonl.gz --report report
    python tools/compress_tokenizer.py --tokenizer-model Qwen3-0.6B --drop-fillers ...
    python tools/compress_tokenizer.py --tokenizer-model qwen.tiktoken --tiktoken-family qwen2 ...

Takes SentencePiece models (BPE, unigram), Hugging Face folders with a BPE tokenizer.json (byte-level, or
with byte fallback) and .tiktoken files. Every id of the corpus is counted with the full tokenizer. A BPE
vocabulary then shrinks from its leaves, so that every piece left can still be produced, and by the pieces
that lengthen the counted text least; a unigram vocabulary keeps its most frequent pieces, with new scores.
Bytes, control pieces, user-defined and added tokens stay. Pieces and merges that stay keep their order.

Writes OUTPUT.idmap.npz and .json (old id -> new id), OUTPUT.counts.npz (counts, to be used again or merged
with others through --counts) and OUTPUT_hf/, a Hugging Face tokenizer folder with configurations and chat
template in the new ids. Of a SentencePiece model also OUTPUT.model and OUTPUT.vocab; its folder is left out,
with the reason, where transformers cannot give the model's ids. --report DIR adds report.md, report.json and
report.png.

Exit code 0: everything is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.tokenizer.compress_run import CompressOptions, compress
from megatron_ext.tokenizer.encoding import BACKENDS
from megatron_ext.tokenizer.tiktoken_file import FAMILIES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="JSON lines or parquet: files, globs, folders"
    )
    p.add_argument("--json-key", default="text", help="key or column of the text (default text)")
    p.add_argument(
        "--on-bad-line",
        choices=["stop", "skip"],
        default="stop",
        help="a line or row that is not UTF-8, not JSON, or has no text: stop (default), or leave it out",
    )
    p.add_argument(
        "--dataset", nargs="+", default=[], metavar="PREFIX", help=".bin/.idx made with the full model"
    )
    p.add_argument("--counts", nargs="+", default=[], metavar="FILE", help="counts that earlier runs saved")
    p.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="the full tokenizer: SentencePiece model, Hugging Face folder or tokenizer.json, .tiktoken file",
    )
    p.add_argument(
        "--vocab-size", type=int, metavar="V", help="pieces of the new model; without it, only count"
    )
    p.add_argument("--output", required=True, metavar="PREFIX", help="OUTPUT.model and so on")
    p.add_argument(
        "--drop-fillers",
        action="store_true",
        help="let fillers that never occur go (<TOKENS_UNUSED_n>, <|reserved_special_token_n|>)",
    )
    p.add_argument(
        "--drop-added-tokens",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="let added tokens that match a shell pattern go, such as '<|reserved_special_token_*|>'",
    )
    _add_tiktoken(p.add_argument_group("what a .tiktoken file does not say"))
    p.add_argument(
        "--tokenizer-backend",
        choices=BACKENDS,
        default="auto",
        help="what encodes with a Hugging Face tokenizer: the fastest library that gives its ids (default), "
        "or Hugging Face's own alone",
    )
    p.add_argument("--workers", type=int, default=1, help="processes that count text (default 1)")
    p.add_argument(
        "--validation", nargs="+", default=[], metavar="FILE", help="held-out text for the report, as --input"
    )
    p.add_argument("--report", metavar="DIR", help="write report.md, report.json, report.png")
    p.add_argument(
        "--model-preset", default="pangu-pi-1b-pro", help="whose share of embedding and head is shown"
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


def _add_tiktoken(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--tiktoken-family", metavar="NAME", help=f"one of {', '.join(FAMILIES)}; or:")
    g.add_argument("--split-pattern", metavar="REGEX", help="the parts that text is cut into before merges")
    g.add_argument(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="by id, from the last rank on; the first ends documents",
    )


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options, typed = command.read(parser(), argv, CompressOptions)
    summary = compress(options)
    print(json.dumps(summary) if typed.json else "\n".join(f"{k}: {v}" for k, v in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

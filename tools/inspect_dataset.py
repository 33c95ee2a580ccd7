"""What is in a .bin/.idx dataset: counts, lengths, samples; --verify reads every byte.

    python tools/inspect_dataset.py --input my_text_document
    python tools/inspect_dataset.py --input my_text_document --samples 3 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model my.model --verify

Exit code 0: the dataset is sound; 1: it is damaged, or of another tokenizer; 2: bad usage.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.data.inspect import Report, report, samples, verify
from megatron_ext.tokenizer.build import TOKENIZER_TYPES, build_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument("--input", required=True, metavar="PREFIX", help="dataset, without .bin or .idx")
    p.add_argument("--verify", action="store_true", help="read all ids, compare checksums with the manifest")
    p.add_argument("--samples", type=int, default=0, metavar="N", help="show the beginnings of N documents")
    p.add_argument(
        "--tokenizer-type", default="SentencePieceTokenizer", choices=TOKENIZER_TYPES, metavar="TYPE"
    )
    p.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="decode samples, and check that the dataset was made with it",
    )
    p.add_argument("--vocab-size", type=int, metavar="N", help="for NullTokenizer")
    p.add_argument("--json", action="store_true", help="print all as one JSON object")
    return p


def text(found: Report, shown: list[dict[str, Any]]) -> str:
    """The report for people."""
    lines = [
        f"documents  {found.documents:,} ({found.empty_documents:,} empty), sequences {found.sequences:,}",
        f"tokens     {found.tokens:,} ({found.dtype}, {found.bytes:,} bytes)",
        "length     " + ", ".join(f"{name} {value:,.0f}" for name, value in found.lengths.items()),
    ]
    most = max((count for _, _, count in found.histogram), default=1) or 1
    for low, high, count in found.histogram:
        lines.append(f"  {low:>12,} to {high - 1:<12,} {count:>12,} {'#' * round(40 * count / most)}")
    if found.verified:
        lines.append(f"verified   {', '.join(found.verified)}")
        if found.largest_id is not None:
            lines.append(f"ids        {found.distinct_ids:,} distinct, largest {found.largest_id:,}")
    for sample in shown:
        lines.append(
            f"document {sample['document']:,}, {sample['tokens']:,} tokens: {sample['ids'][:16]} ..."
        )
        if "text" in sample:
            lines.append(f"    {sample['text']!r}")
    return "\n".join(lines)


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        p.error("--tokenizer-type NullTokenizer needs --vocab-size")
    prefix = args.input.removesuffix(".bin").removesuffix(".idx")
    known = args.tokenizer_model or args.tokenizer_type == "NullTokenizer"
    flags = TokenizerConfig(
        tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model, vocab_size=args.vocab_size
    )
    tokenizer = build_tokenizer(flags) if known else None
    found, index = report(prefix, tokenizer)
    if args.verify:
        verify(prefix, index, found, tokenizer.vocab_size if tokenizer else None)
    shown = samples(prefix, index, args.samples, tokenizer)
    print(json.dumps(asdict(found) | {"samples": shown}) if args.json else text(found, shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""JSON lines or parquet -> PREFIX_KEY_document.bin and .idx, byte for byte as Megatron-LM's tool writes them.

    python tools/preprocess_data.py --input corpus/*.jsonl.gz --output-prefix data/my \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model my.model --append-eod --workers 8
    torchrun ... pretrain_pangu_pro.py --data-path data/my_text_document ...

Each line of the input is a JSON object; the text is in its key "text" (--json-keys), and of parquet in the
column of that name. The output does not depend on --workers. Killed at any moment, the same command goes
on where it was. Files appear whole or not at all, and a manifest, PREFIX_KEY_document.json, says what they
were made of.

Many machines: --shard i/n on each (0 <= i < n), then tools/merge_datasets.py. In a SLURM array:
--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

Exit code 0: everything is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.preprocess.options import Options
from megatron_ext.preprocess.run import describe, preprocess
from megatron_ext.tokenizer.build import TOKENIZER_TYPES
from megatron_ext.tokenizer.encoding import BACKENDS

#: Upstream's flags that cannot take effect here, and why.
REFUSED = {
    "--split-sentences": "splitting into sentences is for BERT and T5; GPT models read documents",
    "--keep-newlines": "only goes with --split-sentences",
    "--lang": "only goes with --split-sentences",
    "--vocab-file": f"only {', '.join(TOKENIZER_TYPES)} are supported, which have --tokenizer-model",
    "--merge-file": f"only {', '.join(TOKENIZER_TYPES)} are supported, which have --tokenizer-model",
    "--tokenizer-metadata": "the type is given by --tokenizer-type",
    "--tokenizer-special-tokens": "special tokens belong into the tokenizer's own files",
    "--tiktoken-pattern": "TikTokenizer is not supported",
    "--tiktoken-special-tokens": "TikTokenizer is not supported",
    "--tiktoken-num-special-tokens": "TikTokenizer is not supported",
    "--legacy-tokenizer": "upstream removed the legacy tokenizers",
    "--tokenizer-sentencepiece-legacy": "special tokens belong into the model itself",
}


class Refuse(argparse.Action):
    """A flag of upstream's that is an error here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} is not supported: {REFUSED[str(option_string)]}")


def shard(text: str) -> tuple[int, int]:
    """'3/16' -> (3, 16)."""
    try:
        which, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n, such as 0/16") from None
    if not 0 <= which < count:
        raise argparse.ArgumentTypeError(f"{text!r}: i counts from 0 and must be below n")
    return which, count


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    _add_input(p.add_argument_group("input"))
    _add_tokenizer(p.add_argument_group("tokenizer"))
    _add_output(p.add_argument_group("output and run"))
    ignored = p.add_argument_group("flags of Megatron-LM's that change nothing here")
    ignored.add_argument("--partitions", type=positive, default=1, help="the output is the same for any")
    ignored.add_argument("--keep-sequential-samples", action="store_true", help="the order is always kept")
    ignored.add_argument("--padded-vocab-size", type=positive, help="a matter of the model")
    ignored.add_argument("--vocab-extra-ids", type=int, choices=[0], help="must be 0, as upstream sets it")
    for name in REFUSED:
        p.add_argument(name, nargs="*", action=Refuse, help=argparse.SUPPRESS)
    return p


def _add_input(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON lines (plain, .gz, .zst, .xz, .bz2) and parquet: files, globs, folders, or - for a pipe",
    )
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys or columns to encode, each into a dataset of its own (default: text)",
    )
    data.add_argument(
        "--on-bad-line",
        choices=["stop", "skip", "quarantine"],
        default="stop",
        help="a line or row that is not UTF-8, not JSON, or has no text: stop without output (default), "
        "or leave it out and note file, line and reason in PREFIX_bad_lines.jsonl; quarantine "
        "also keeps the line there",
    )
    data.add_argument(
        "--dedup", action="store_true", help="keep only the first of documents with exactly the same text"
    )
    data.add_argument(
        "--shard", type=shard, metavar="i/n", help="make part i (from 0) of n; merge them later"
    )


def _add_tokenizer(tok: argparse._ArgumentGroup) -> None:
    tok.add_argument(
        "--tokenizer-type",
        required=True,
        choices=TOKENIZER_TYPES,
        metavar="TYPE",
        help=", ".join(TOKENIZER_TYPES),
    )
    tok.add_argument("--tokenizer-model", metavar="PATH", help="SentencePiece file, or Hugging Face folder")
    tok.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="NullTokenizer: the text holds numbers below N; N ends a document",
    )
    tok.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document id"
    )
    tok.add_argument("--tokenizer-hf-use-fast", action="store_true", help="fast Hugging Face tokenizer")
    tok.add_argument(
        "--tokenizer-hf-include-special-tokens",
        action="store_true",
        help="let the Hugging Face tokenizer add its special tokens",
    )
    tok.add_argument(
        "--tokenizer-backend",
        choices=BACKENDS,
        default="auto",
        help="what encodes with a Hugging Face tokenizer: auto takes the fastest library that gives its ids "
        "and compares a sample of the documents (default); tokenizers is Hugging Face's own alone, "
        "about ten times slower",
    )
    tok.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow a Hugging Face tokenizer to run Python code of its folder",
    )


def _add_output(out: argparse._ArgumentGroup) -> None:
    out.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin, .idx and .json",
    )
    out.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one a core)",
    )
    out.add_argument(
        "--log-interval",
        type=positive,
        default=1000,
        metavar="N",
        help="documents between two progress lines at least (default: 1000)",
    )
    out.add_argument("--json", action="store_true", help="print the summary as one JSON object")


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options, args = command.read(parser(), argv, Options, tokenizer=TokenizerConfig)
    try:
        summary = preprocess(options)
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command goes on where it was") from None
    if args.json:
        print(json.dumps(summary))
    else:
        print(describe(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

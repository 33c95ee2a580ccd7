"""A corpus of text from this machine itself: what the packages of its Python say of themselves.

    python tools/make_demo_corpus.py --output demo.jsonl.gz --valid-output demo_valid.jsonl.gz

Takes the language reference that Python carries (pydoc's topics), the README files of installed packages, and
the docstrings of the standard library and the packages, cleans them lightly, leaves out code and licences,
drops exact duplicates, and writes JSON lines {"text": ..., "source": ...} in an order that depends on the
texts alone. Nothing is downloaded; the same installation always gives the same corpus.

Exit code 0: everything is in place; 1: too little text found; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.common.files import is_same_place
from megatron_ext.data.demo_corpus import collect, split, write


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument("--output", required=True, metavar="FILE", help="JSON lines; gzip if the name ends in .gz")
    p.add_argument("--valid-output", metavar="FILE", help="put 2 %% of the documents there instead")
    p.add_argument(
        "--max-bytes", type=int, default=12_000_000, metavar="N", help="text bytes (default: 12000000)"
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.max_bytes < 1:
        p.error("--max-bytes must be above 0")
    if args.valid_output and is_same_place(args.output, args.valid_output):
        p.error("--output and --valid-output are the same file")
    documents = collect(args.max_bytes)
    if not documents:
        raise FileNotFoundError("this Python has no sources on disk to take text from")
    train, valid = split(documents) if args.valid_output else (documents, [])
    summary = {args.output: write(args.output, train)}
    if args.valid_output:
        summary[args.valid_output] = write(args.valid_output, valid)
    if args.json:
        print(json.dumps(summary))
    else:
        for name, facts in summary.items():
            print(f"{name}: {facts['documents']:,} documents, {facts['text_bytes']:,} bytes of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())

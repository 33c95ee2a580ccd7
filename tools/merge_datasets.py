"""Several .bin/.idx datasets -> one, document after document.

    python tools/merge_datasets.py --input FOLDER --output-prefix merged
    python tools/merge_datasets.py --input a_text_document b_text_document --output-prefix merged

A folder stands for its datasets in the order of their names, so that the parts of
tools/preprocess_data.py --shard i/n become the very dataset that one run would have made.

Exit code 0: everything is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.data.merge import find_prefixes, merge


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="folder, or prefixes of the datasets"
    )
    p.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx and PREFIX.json",
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = parser().parse_args(argv)
    prefixes = find_prefixes(args.input)
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    manifest = merge(prefixes, args.output_prefix)
    if args.json:
        print(json.dumps(manifest))
    else:
        print(
            f"{args.output_prefix}: {len(prefixes)} datasets, {manifest['documents']:,} documents, "
            f"{manifest['tokens']:,} tokens ({manifest['dtype']})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

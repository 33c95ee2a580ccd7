"""Losses of a training set -> the samples of the next round of training.

    torchrun ... pretrain_pangu_pro.py FLAGS_OF_ROUND_1 --load ROUND_1 --record-sample-loss losses.npy
    python tools/build_round.py --losses losses.npy --rate 0.5 --group-size 16 --output round2.npy
    torchrun ... pretrain_pangu_pro.py FLAGS --pretrained-checkpoint ROUND_1 --round-index round2.npy ...

Groups of --group-size samples, in training order, are drawn without replacement with p = softmax(group
loss / temperature): exactly, in constant memory, for any number of samples. --output is an .npy of int64
sample numbers; beside it lie the manifest (.json), which training checks, and a picture (.png).
--losses may also be a plain .npy of floats: then nothing is known of the training set it is of.
The paper keeps half (--rate 0.5) and finds that a third round gives nothing.
--rate 1 --order training makes the index of all samples in their order.

Exit code 0: everything is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.data.rounds import round_report
from megatron_ext.data.rounds.build_round import RoundOptions, build_round
from megatron_ext.data.rounds.dataset import round_paths


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__, options=RoundOptions)
    p.add_argument(
        "--losses", required=True, metavar="PATH", help="written by --record-sample-loss, or an .npy"
    )
    p.add_argument("--output", required=True, metavar="PATH", help="the .npy to write")
    p.add_argument("--no-plot", action="store_true", help="draw no picture")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options, args = command.read(parser(), argv, RoundOptions)
    manifest, report = build_round(args.losses, options, args.output, show_progress=True)
    paths = round_paths(args.output)
    try:
        if not args.no_plot:
            round_report.plot(manifest, report, paths.plot)
    except ImportError:
        print("no picture: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)
    if args.json:
        print(json.dumps(manifest | {"output": str(paths.index)}))
    else:
        print(round_report.text(manifest, report))
        print(f"wrote {paths.index} and {paths.manifest}; one epoch is {manifest['selected']:,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())

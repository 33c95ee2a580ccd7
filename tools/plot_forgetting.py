"""Draw what a model forgot: its loss on its training samples, in the order it was trained on them.

    torchrun ... pretrain_pangu_pro.py FLAGS_OF_THE_RUN --load CHECKPOINT --record-sample-loss losses.npy
    python tools/plot_forgetting.py losses.npy --output forgetting.png
    python tools/plot_forgetting.py losses.npy online.npy --output both.png    # beside those while training

A curve that falls from left to right shows forgetting: the end was seen last. Losses recorded with
--record-mode online show how far the model was at each sample instead.

Exit code 0: the picture is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.common.files import refuse_overwriting
from megatron_ext.data.rounds import forgetting
from megatron_ext.data.rounds.loss_record import read_losses, record_paths


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument("losses", nargs="+", metavar="LOSSES", help="files of --record-sample-loss, or plain .npy")
    p.add_argument("--output", type=Path, required=True, metavar="PATH", help="the PNG (or .svg, .pdf)")
    p.add_argument("--points", type=int, default=100, metavar="N", help="of each curve (default: 100)")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.points < 1:
        p.error(f"--points {args.points}: must be at least 1")
    refuse_overwriting([args.output], [f for path in args.losses for f in vars(record_paths(path)).values()])
    curves = {}
    for path in args.losses:
        found = read_losses(path)
        kind = f" ({found.manifest['kind']})" if found.manifest else ""
        curves[str(path) + kind] = forgetting.curve(found, args.points)
    try:
        forgetting.plot(curves, args.output)
    except ImportError:
        raise ValueError("drawing needs: pip install matplotlib") from None
    ends = {name: found.ends() for name, found in curves.items()}
    if args.json:
        told = {name: {"first_tenth": first, "last_tenth": last} for name, (first, last) in ends.items()}
        print(json.dumps({"output": str(args.output), "losses": told}))
    else:
        for name, (first, last) in ends.items():
            print(f"{name}: first tenth {first:.4f}, last tenth {last:.4f}, forgotten {first - last:+.4f}")
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

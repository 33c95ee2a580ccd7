#!/usr/bin/env python3
"""The mean of checkpoints, as a checkpoint of iteration 0.

    python tools/average_checkpoints.py --load checkpoints/run --last 5 --save averaged
    python tools/average_checkpoints.py --load checkpoints/run --ckpt-step 800 900 1000 --weights 1 2 3 \\
        --save averaged
    python tools/average_checkpoints.py --load seed1 seed2/iter_0001000 --save soup
    python pretrain_pangu_pro.py --pretrained-checkpoint averaged ...
    python tools/generate_text.py --load averaged --prompt "..."

Reads checkpoints of any layout, ours or Megatron-LM's, and Hugging Face folders; they must be the same
model with the same tokenizer. One tensor of each is in memory at a time. The result holds weights alone and
loads at any layout.

Exit code 0: the checkpoint is in place; 1: bad input; 2: bad usage.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.interchange.average import AverageOptions, average


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = command.parser(__doc__, options=AverageOptions)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    options, typed = command.read(parser, argv, AverageOptions)
    summary = average(options, quiet=typed.json)
    if typed.json:
        print(json.dumps(summary))
        return 0
    for weight, source in zip(summary["weights"], summary["from"], strict=True):
        print(f"{weight:7.4f}  {source}")
    print(f"wrote {summary['to']} ({summary['dtype']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

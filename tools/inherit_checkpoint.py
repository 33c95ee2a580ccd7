"""A smaller model that starts from a larger one's weights, as a checkpoint of iteration 0.

    python tools/inherit_checkpoint.py --load big --save small --target-num-layers 8 \\
        --target-hidden-size 192 --target-ffn-hidden-size 640 --target-num-query-groups 3
    python tools/inherit_checkpoint.py --load llama-2-7b --save pro --model-preset pangu-pi-1b-pro \\
        --target-tokenizer-model compact.model --width-criterion learned --data-path calibration_text_document
    torchrun --nproc-per-node 4 tools/inherit_checkpoint.py ...   # the ranks share the calibration text
    python pretrain_pangu_pro.py --pretrained-checkpoint small ...

The source is a Hugging Face folder (docs/interchange.md names the families) or a checkpoint, of any layout.
Hidden channels are chosen once for the residual stream, FFN channels and query groups in every layer. Rows of
the vocabulary go by piece; a piece that the source lacks starts from the mean of the pieces of its text.

--depth-policy and --width-criterion that look at text (importance, taylor, learned) need --data-path, a
dataset made with the target's tokenizer; with it, the loss is measured before and after.

Exit code 0: the checkpoint is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.inherit.options import InheritOptions


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options, typed = command.read(parser(), argv, InheritOptions)

    # Imported after the flags are known to be right: these take seconds.
    from megatron_ext import platform

    platform.activate(typed.device)
    from megatron_ext.inherit import report
    from megatron_ext.inherit.run import inherit
    from megatron_ext.platform.collective import rank
    from megatron_ext.training import distributed

    summary = inherit(options)
    first = rank() == 0
    distributed.finalize()
    if first:
        print(json.dumps(summary) if typed.json else "\n".join(report.lines(summary)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__, options=InheritOptions)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return p


if __name__ == "__main__":
    sys.exit(main())

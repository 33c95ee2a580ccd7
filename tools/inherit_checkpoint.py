"""A smaller model that starts from a larger one's weights, as a checkpoint of iteration 0.

    python tools/inherit_checkpoint.py --load big --save small --target-num-layers 8 \\
        --target-hidden-size 192 --target-ffn-hidden-size 640 --target-num-query-groups 3
    python tools/inherit_checkpoint.py --load llama-2-7b --save pro --model-preset pangu-pi-1b-pro \\
        --target-tokenizer-model compact.model --width-criterion learned --data-path calibration_text_document
    torchrun --nproc-per-node 4 tools/inherit_checkpoint.py ...   # the ranks share the calibration text
    python pretrain_pangu_pro.py --pretrained-checkpoint small ...

The source is a Hugging Face folder (Llama, Mistral, Qwen2, InternLM2) or a checkpoint, of any layout. Hidden
channels are chosen once for the residual stream, FFN channels and query groups in every layer. Rows of the
vocabulary go by piece; a piece that the source lacks starts from the mean of the pieces of its text.

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
from megatron_ext.inherit.options import DEPTH, WIDTH, InheritOptions


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
    p = command.parser(__doc__)
    _add_source(p.add_argument_group("source"))
    _add_target(p.add_argument_group("target (what is not given is as in the source)"))
    _add_choice(p.add_argument_group("choice"))
    _add_calibration(p.add_argument_group("calibration"))
    _add_learned(p.add_argument_group("learned masks"))
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return p


def _add_source(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--load", required=True, metavar="DIR", help="Hugging Face folder or checkpoint")
    g.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration of a checkpoint (default: the newest)"
    )
    g.add_argument(
        "--tokenizer-model", metavar="PATH", help="the source's tokenizer, if it moved since the training"
    )
    g.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin too, weights only")


def _add_target(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--save", required=True, metavar="DIR", help="a folder without checkpoints")
    g.add_argument("--model-preset", metavar="NAME", help="shape by name; flags that are typed win")
    for name, what in (
        ("--target-num-layers", "layers"),
        ("--target-hidden-size", "hidden channels"),
        ("--target-ffn-hidden-size", "FFN channels"),
        ("--target-num-attention-heads", "query heads; the source's number of heads a group is kept"),
        ("--target-num-query-groups", "query groups"),
    ):
        g.add_argument(name, type=int, metavar="N", help=what)
    g.add_argument("--target-tokenizer-model", metavar="PATH", help="its tokenizer, often a compressed one")
    g.add_argument("--series-activation-order", type=int, metavar="N", help="new terms start at zero")
    g.add_argument("--augmented-shortcuts", type=int, metavar="N", help="new shortcuts start without effect")
    g.add_argument("--augmented-shortcut-reduction", type=int, metavar="N", help="hidden / bottleneck")
    g.add_argument(
        "--untie-embeddings-and-output-weights", action="store_true", help="of a source that ties them"
    )
    g.add_argument("--report", metavar="DIR", help="for report.json, .png and choice.npz (SAVE/inheritance)")


def _add_choice(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--depth-policy", choices=DEPTH, default="ends", help="which layers stay (default ends)")
    g.add_argument("--layers", type=int, nargs="+", metavar="N", help="for --depth-policy list, from 0")
    g.add_argument("--width-criterion", choices=WIDTH, default="l2", help="which channels stay (default l2)")
    g.add_argument("--seed", type=int, default=1234, help="of random choices, new weights and samples")


def _add_calibration(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--data-path", nargs="+", metavar="PREFIX", help="datasets of the target's tokenizer")
    g.add_argument("--data-cache-path", metavar="DIR", help="where indices of datasets are kept")
    g.add_argument("--seq-length", type=int, default=512, metavar="N", help="tokens per sample (default 512)")
    g.add_argument("--micro-batch-size", type=int, default=4, metavar="N", help="samples a pass (default 4)")
    g.add_argument(
        "--calibration-samples",
        type=int,
        default=64,
        metavar="N",
        help="samples for importance, taylor, and the losses before and after (default 64)",
    )

    g.add_argument(
        "--calibration-dtype",
        choices=["fp32", "bf16"],
        help="number format of the source while it reads text (default: fp32 on a CPU, its own on a GPU); "
        "bf16 halves the memory, and is fast on CPUs with bf16 instructions; scores and masks stay fp32",
    )


def _add_learned(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--mask-steps", type=int, default=100, metavar="N", help="at most (default 100)")
    g.add_argument("--mask-batch-size", type=int, default=8, metavar="N", help="samples per step (default 8)")
    g.add_argument("--mask-lr", type=float, default=0.03, metavar="X", help="rate, falls to 0 (default 0.03)")
    g.add_argument(
        "--mask-temperature",
        type=float,
        nargs=2,
        default=(0.3, 0.03),
        metavar=("START", "END"),
        help="of the sigmoid that masks are (default 0.3 0.03)",
    )
    g.add_argument(
        "--mask-patience", type=int, default=30, metavar="N", help="stop after N steps without a change"
    )
    g.add_argument(
        "--mask-state", metavar="FILE", help="save the state here, and go on from it if it is there"
    )


if __name__ == "__main__":
    sys.exit(main())

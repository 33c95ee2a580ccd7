#!/usr/bin/env python3
"""Convert a model between Hugging Face's folders and checkpoints of this project or Megatron-LM.

    python tools/convert_checkpoint.py --from hf --to megatron --load TinyLlama-1.1B --save checkpoints/llama
    python tools/convert_checkpoint.py --from megatron --to hf --load checkpoints/run --save exported

Import reads Llama, Mistral, Qwen2, InternLM2 and exported PanGu-pi models from safetensors; the checkpoint
holds the weights alone, at iteration 0, and loads at any tensor and pipeline parallel size:
    torchrun ... pretrain_pangu_pro.py --pretrained-checkpoint checkpoints/llama ...
    python tools/generate_text.py --load checkpoints/llama --prompt "..."

Export writes a folder that transformers loads by itself: a LlamaForCausalLM (Qwen2 with biases of queries,
keys and values), or, with PanGu-pi modules, a model whose code lies in the folder (trust_remote_code=True).

Nothing but tensors is read; one tensor, or on export one file of weights, is in memory at a time. The output
appears when it is complete. Exit code 0: it is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.interchange.options import ConvertOptions

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    kinds = ("hf", "megatron")
    p.add_argument("--from", dest="source", choices=kinds, required=True, help="what --load is")
    p.add_argument("--to", dest="target", choices=kinds, required=True, help="what --save shall be")
    p.add_argument(
        "--load", required=True, metavar="DIR", help="the model: a folder with config.json; or a --save"
    )
    p.add_argument("--save", required=True, metavar="DIR", help="where to: a new or empty folder")
    p.add_argument(
        "--ckpt-step", type=int, help="iteration of the checkpoint in --load (default: the newest)"
    )
    p.add_argument(
        "--tokenizer-model", metavar="PATH", help="the model's tokenizer, if it moved or is not there"
    )
    p.add_argument(
        "--dtype",
        choices=("source", "fp32", "bf16", "fp16"),
        default="source",
        help="number format of the tensors to write (default: as they are)",
    )
    p.add_argument(
        "--hf-architecture",
        metavar="TYPE",
        help="model_type to export as: llama, qwen2, mistral, internlm2, pangu_pi (default: the plainest)",
    )
    p.add_argument(
        "--max-shard-size",
        type=_bytes,
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: 2GB)",
    )
    p.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors, as plain tensors (weights_only)",
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    return int(found[1]) * UNITS[found[2]]


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options, typed = command.read(build_parser(), argv, ConvertOptions)

    from megatron_ext.interchange.convert import convert  # takes seconds

    summary = convert(options, quiet=typed.json)
    print(json.dumps(summary) if typed.json else "\n".join(f"{k}: {v}" for k, v in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

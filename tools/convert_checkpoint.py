#!/usr/bin/env python3
"""Convert a model between Hugging Face's folders and checkpoints of this project or Megatron-LM.

    python tools/convert_checkpoint.py --from hf --to megatron --load TinyLlama-1.1B --save checkpoints/llama
    python tools/convert_checkpoint.py --from megatron --to hf --load checkpoints/run --save exported

Import reads Llama, Mistral, Qwen 2 and 3, InternLM2, SmolLM 3, OLMo 2, Phi-3, Granite, Gemma 3 (text) and
exported PanGu-pi models from safetensors (docs/interchange.md). The checkpoint holds the weights alone, at
iteration 0, and loads at any tensor and pipeline parallel size:
    torchrun ... pretrain_pangu_pro.py --pretrained-checkpoint checkpoints/llama ...
    python tools/generate_text.py --load checkpoints/llama --prompt "..."

Export writes a folder that transformers loads by itself: the plainest of these architectures that holds the
model, or, with PanGu-pi modules, a model whose code lies in the folder (trust_remote_code=True).

Nothing but tensors is read; one tensor, or on export one file of weights, is in memory at a time. The output
appears when it is complete. Exit code 0: it is in place; 1: bad input; 2: bad usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.interchange.options import ConvertOptions


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__, options=ConvertOptions)
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


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

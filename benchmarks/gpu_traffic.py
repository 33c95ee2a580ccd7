#!/usr/bin/env python
"""Operators and bytes that a training step on a GPU moves outside its products and attention; needs no GPU.

    python benchmarks/gpu_traffic.py                                     # 1.5b-pro in bf16, micro batch 4
    python benchmarks/gpu_traffic.py --shape 1b-pro --micro-batch-size 8 --json
    python benchmarks/gpu_traffic.py --operators "cross entropy"         # what a part consists of

Models of one and of two layers run forward, backward and the optimizer's step on fake tensors of the real
shapes, on one rank with the local layers; every operator that torch would start is counted with the tensors
that it reads and writes, and belongs to the part of the model that it was called in, its gradient too. What
the second layer adds is a layer; the rest is embedding, output and loss. Views cost nothing, a tensor that is
expanded counts once, and caches are not modelled: an operator reads its inputs from memory and writes its
outputs to it. The Triton kernels count what their launches say (megatron_ext/kernels/launch.py).

Three columns. plain: PyTorch's operators alone, without Triton and torch's fused RMSNorm (2.9). before: with
that norm and the series activation in Triton. now: everything the project has.
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import warnings

VARIANTS = ("plain", "before", "now")
#: Not counted: they are bound by arithmetic, not by memory.
COMPUTE = ("products", "attention")
LAYER, ENDS, STEP = (
    "a layer, a micro batch",
    "embedding, output and loss, a micro batch",
    "a layer, the update",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="1.5b-pro", metavar="PRESET")
    p.add_argument("--micro-batch-size", type=int, default=4, metavar="N")
    p.add_argument("--seq-length", type=int, metavar="N", help="default: the preset's")
    p.add_argument("--operators", metavar="PART", help="list the operators of this part instead")
    p.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    return p


def main() -> int:
    """Count the three variants and print them side by side."""
    warnings.filterwarnings("ignore")
    options = parser().parse_args()
    found = {variant: count(options, variant) for variant in VARIANTS}
    if options.json:
        print(
            json.dumps({name: totals(places) | {"waits": waits} for name, (places, waits) in found.items()})
        )
    elif options.operators:
        print(
            "\n".join(
                f"{variant}\n{listing(places, options.operators)}" for variant, (places, _) in found.items()
            )
        )
    else:
        print(f"{options.shape}, micro batch {options.micro_batch_size}; MB moved (operators)")
        print(table(found))
    return 0


def count(options: argparse.Namespace, variant: str) -> tuple[dict[str, dict], int]:
    """((place -> (part, operator) -> [number, bytes]), waits for the GPU in a step of the whole model)."""
    from megatron_ext import platform

    platform.activate("cpu")  # before the first import of Megatron-Core
    from benchmarks.gpu_traffic_counter import OPTIMIZER, VOCABULARY, count_step
    from megatron_ext.config.presets import preset

    flags = (
        f"--model-preset {options.shape} --bf16 --train-iters 10 --lr 1e-4 --weight-decay 0.1 "
        f"--micro-batch-size {options.micro_batch_size} --global-batch-size {options.micro_batch_size} "
        f"--mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1}"
    )
    flags += f" --seq-length {options.seq_length}" if options.seq_length else ""
    one, two = (count_step(variant, f"{flags} --num-layers {layers}") for layers in (1, 2))
    places: dict[str, dict] = {LAYER: {}, ENDS: {}, STEP: {}}
    for key in one.counts:
        number, size = two.counts[key] - one.counts[key], two.bytes[key] - one.bytes[key]
        if key[0] in OPTIMIZER:
            places[STEP][key] = number, size
        else:
            places[LAYER][key] = number, size
            places[ENDS][key] = one.counts[key] - number, one.bytes[key] - size
    layers = preset(options.shape).num_layers
    return places, one.syncs + (layers - 1) * (two.syncs - one.syncs)


def totals(places: dict[str, dict]) -> dict[str, dict[str, tuple[int, int]]]:
    """Operators and bytes of every part that has any, by place."""
    found: dict[str, dict] = {}
    for place, operators in places.items():
        parts = found.setdefault(place, {})
        for (part, _), (number, size) in operators.items():
            if (number or size) and part not in COMPUTE:
                before = parts.get(part, (0, 0))
                parts[part] = before[0] + number, before[1] + size
    return found


def table(found: dict[str, tuple[dict, int]]) -> str:
    """A column a variant: megabytes and operators of each part of each place, and their sums."""
    columns = [totals(places) for places, _ in found.values()]
    lines = [f"{'':<42}" + "".join(f"{variant:>18}" for variant in found)]
    for place in (LAYER, ENDS, STEP):
        lines.append(place)
        parts = sorted({part for column in columns for part in column[place]})
        for part in parts:
            lines.append(f"  {part:<40}" + "".join(_cell(column[place].get(part)) for column in columns))
        sums = [[sum(values) for values in zip(*column[place].values(), strict=True)] for column in columns]
        lines.append(f"  {'sum':<40}" + "".join(map(_cell, sums)))
        lines.append(f"  {'of before':<40}" + "".join(f"{size / sums[1][1]:>18.0%}" for _, size in sums))
    waits = "".join(f"{waits:>18}" for _, waits in found.values())
    return "\n".join([*lines, f"{'waits for the GPU, a step of one micro batch':<42}" + waits])


def _cell(entry: tuple[int, int] | None) -> str:
    return f"{'-':>18}" if entry is None else f"{entry[1] / 1e6:>11.1f} ({entry[0]:>4})"


def listing(places: dict[str, dict], part: str) -> str:
    """The operators of one part."""
    return "\n".join(
        f"  {place}: {number:>4} {operator:<40}{size / 1e6:>11.1f} MB"
        for place, operators in places.items()
        for (owner, operator), (number, size) in sorted(operators.items(), key=lambda item: -item[1][1])
        if owner == part and (number or size)
    )


if __name__ == "__main__":
    sys.exit(main())

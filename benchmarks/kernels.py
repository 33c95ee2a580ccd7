#!/usr/bin/env python
"""The fused CPU kernels beside plain PyTorch and torch's own fused operators, side by side in one run.

Every candidate of a kernel runs in turn, round after round, forward and backward together. The table shows
for each the median wall time, the median CPU time of the whole process (all threads; the fairer number on
a machine that others use too), plain PyTorch's times over both, and the bandwidth: the bytes that the kernel
must at least move, over wall time, and as a share of a copy's in the same rounds. Memory that a round frees
is kept for the next, as in a training run; --fresh-memory gives it back, and every round pays page faults.

    python benchmarks/kernels.py --rows 4096 --ffn 5632 --rounds 9
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext import platform
from megatron_ext.kernels import fused, multi_tensor
from megatron_ext.kernels.cross_entropy import vocab_parallel_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Candidates = dict[str, Callable[[], object]]
PLAIN, OURS = "plain PyTorch", "ours"


def differentiated(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> Callable[[], object]:
    """Forward and backward of ``function`` at ``inputs``; nothing is kept between calls."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def activation(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Candidates, float]:
    rows, f, n = args.rows, args.ffn, args.terms
    inputs = [torch.randn(rows, 2 * f).to(dtype), torch.randn(n, f).to(dtype), torch.randn(n, f).to(dtype)]
    grad = torch.randn(rows, f).to(dtype)
    forward_and_backward = (2 + 1) + (2 + 1 + 2)  # x, y; x, dy, dx, in units of [rows, f]
    return {
        PLAIN: differentiated(fused.series_swiglu_reference, inputs, grad),
        OURS: differentiated(fused.series_swiglu, inputs, grad),
    }, forward_and_backward * grad.nbytes


def norm(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Candidates, float]:
    inputs = [torch.randn(args.rows, args.hidden).to(dtype), torch.randn(args.hidden).to(dtype)]
    grad = torch.randn_like(inputs[0])

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight

    return {
        PLAIN: differentiated(plain, inputs, grad),
        "F.rms_norm": differentiated(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), inputs, grad),
        OURS: differentiated(lambda x, w: fused.rms_norm(x, w, 1e-5), inputs, grad),
    }, 5 * grad.nbytes  # x, y; x, dy, dx


def rope(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Candidates, float]:
    half = torch.randn(args.rows, 1, 1, 64)
    freqs, t = torch.cat((half, half), -1), torch.randn(args.rows, 1, args.hidden // 128, 128).to(dtype)
    return {
        PLAIN: differentiated(lambda t: fused.apply_rope_reference(t, freqs), [t], t),
        OURS: differentiated(lambda t: fused.apply_rope(t, freqs), [t], t),
    }, 4 * t.nbytes


def cross_entropy(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Candidates, float]:
    rows = args.rows // 4
    logits, target = torch.randn(rows, args.vocab).to(dtype), torch.randint(args.vocab, (rows,))
    grad = torch.full((rows,), 1.0 / rows)

    def plain(x: Tensor) -> Tensor:
        wide = x.float()
        shifted = wide - wide.amax(-1, keepdim=True)
        return shifted.exp().sum(-1).log() - shifted.gather(1, target[:, None])[:, 0]

    def ours() -> object:
        # backward uses the logits up; softmax's gradient in its place takes as long to read again
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(vocab_parallel_cross_entropy(leaf, target), leaf, grad)

    return {
        PLAIN: differentiated(plain, [logits], grad),
        "F.cross_entropy": differentiated(
            lambda x: F.cross_entropy(x.float(), target, reduction="none"), [logits.clone()], grad
        ),
        OURS: ours,
    }, 3 * logits.nbytes  # read; read and write


def grad_norm(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Candidates, float]:
    tensors = [torch.randn(args.hidden, args.hidden).to(dtype) for _ in range(4)]
    return {
        PLAIN: lambda: torch.stack([t.norm() for t in tensors]).norm().item(),
        "float64 PyTorch": lambda: sum(t.double().square().sum() for t in tensors).item(),
        OURS: lambda: multi_tensor.sum_of_squares(tensors),
    }, sum(t.nbytes for t in tensors)


KERNELS = {
    "series activation": activation,
    "RMSNorm": norm,
    "RoPE": rope,
    "cross entropy": cross_entropy,
    "gradient norm": grad_norm,
}


def measure(candidates: Candidates, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Name -> (wall, CPU) seconds of each round; the order rotates, one round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            candidates[name]()
            if i:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def compare(name: str, args: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    """One row of the table for every candidate of a kernel."""
    candidates, moved = KERNELS[name](args, dtype)
    source = torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = measure({**candidates, "copy": lambda: target.copy_(source)}, args.rounds)
    copy_speed = 2 * source.nbytes / statistics.median(wall for wall, _ in times.pop("copy"))
    plain_wall, plain_cpu = (statistics.median(column) for column in zip(*times[PLAIN], strict=True))
    rows = []
    for candidate, seconds in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(
            {
                "kernel": name,
                "candidate": candidate,
                "wall_ms": wall * 1e3,
                "fastest_wall_ms": min(seconds)[0] * 1e3,
                "cpu_ms": cpu * 1e3,
                "speedup_wall": plain_wall / wall,
                "speedup_cpu": plain_cpu / cpu,
                "gb_per_s": moved / wall / 1e9,
                "share_of_copy": moved / wall / copy_speed,
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS), metavar="NAME")
    parser.add_argument("--rows", type=int, default=4096, help="tokens (a quarter of them for cross entropy)")
    parser.add_argument("--ffn", type=int, default=5632, help="FFN channels of the series activation")
    parser.add_argument("--terms", type=int, default=2, help="terms of the series")
    parser.add_argument(
        "--hidden", type=int, default=2048, help="width of norm and RoPE; AdamW takes four squares"
    )
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="storage (AdamW is always fp32)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh-memory", action="store_true", help="give freed memory back to the system")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if not fused.available():
        print(
            "megatron_ext._kernels is not built: run `python setup.py build_ext --inplace`", file=sys.stderr
        )
        return 1
    if not args.fresh_memory:
        platform.keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    if not args.json:
        print(f"{'kernel':18} {'candidate':18}   wall ms    cpu ms  x wall   x cpu   GB/s   copy")
    for name in args.kernels:
        for row in compare(name, args, DTYPES[args.dtype]):
            rows.append(row)
            if not args.json:
                print(
                    f"{name:18} {row['candidate']:18} {row['wall_ms']:9.2f} {row['cpu_ms']:9.2f} "
                    f"{row['speedup_wall']:7.2f} {row['speedup_cpu']:7.2f} {row['gb_per_s']:6.1f} "
                    f"{row['share_of_copy']:6.0%}",
                    flush=True,
                )
    if args.json:
        settings = {**vars(args), "instruction_set": fused._kernels.isa(), "torch": torch.__version__}
        print(json.dumps({"settings": settings, "results": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""What attending within documents alone (--reset-attention-mask) saves of a training step on a CPU.

    python benchmarks/documents.py                                  # small at three sequence lengths
    python benchmarks/documents.py --preset tiny --seq-lengths 256 1024 --rounds 9 --json

Sequences of random tokens, packed with documents of geometric lengths, their mean a quarter of the
sequence (--documents). One model takes a step of each kind in turn, in rotating order, round after round, on
documents of the round's own:

  causal      no documents: every token sees all tokens before it
  documents   the starts of the documents go to the attention kernel
  mask        the same as a mask [b, 1, s, s], which goes to torch's scaled_dot_product_attention

Times are processor time over causal's, medians of the rounds' own ratios. "pairs" are the pairs of tokens
that see each other and "blocks" the kernel's blocks of 64 x 64 with such a pair, both as shares of what is
causal; "attention" is the kernel alone, forward and backward, on the same documents. Where others use the
machine take --threads 1: threads that wait count.
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
from tqdm import tqdm

from megatron_ext import platform

platform.activate("cpu")

from benchmarks.train_step_worker import as_sample  # noqa: E402
from megatron_ext.arguments.parser import read_args  # noqa: E402
from megatron_ext.config import RunConfig  # noqa: E402
from megatron_ext.kernels import attention, documents  # noqa: E402
from megatron_ext.models.builder import build_model, ddp_config, wrap_for_training  # noqa: E402
from megatron_ext.models.config import transformer_config  # noqa: E402
from megatron_ext.training import distributed  # noqa: E402
from megatron_ext.training.loop import connect  # noqa: E402
from megatron_ext.training.optimizer import build_optimizer, optimizer_config  # noqa: E402
from megatron_ext.training.schedule import build_scheduler  # noqa: E402
from megatron_ext.training.step import train_step  # noqa: E402

VOCABULARY, BLOCK = 8192, 64
CAUSAL, DOCUMENTS, MASK = "causal", "documents", "mask"
#: Does what is measured, in the given round.
Contender = Callable[[int], None]


def configuration(args: argparse.Namespace, length: int) -> RunConfig:
    """The trainer's configuration for one sequence length."""
    flags = (
        f"--model-preset {args.preset} --seq-length {length} --mock-data --tokenizer-type NullTokenizer "
        f"--vocab-size {VOCABULARY - 1} --micro-batch-size {max(1, args.tokens // length)} "
        f"--global-batch-size {max(1, args.tokens // length)} --train-iters 1000 --lr 1e-4 "
        f"--lr-decay-style constant {'--bf16' if args.precision == 'bf16' else ''}"
    )
    run = read_args(flags.split(), world_size=1, device="cpu")
    return run.but(padded_vocab_size=VOCABULARY)


def packed(run: RunConfig, share: float, rounds: int) -> torch.Tensor:
    """[rounds, b, s] int32: documents for each round, their mean length ``share`` of the sequence."""
    shape = (rounds, run.training.micro_batch_size, run.data.seq_length)
    generator = torch.Generator().manual_seed(run.data.seq_length)
    return documents.document_starts(torch.rand(shape, generator=generator) < 1 / (share * shape[-1]))


def steps(run: RunConfig, starts: torch.Tensor) -> dict[str, Contender]:
    """A training step of one model on a round's microbatch."""
    config = transformer_config(run)
    model = wrap_for_training(build_model(config, run), config, ddp_config(run))
    optimizer = build_optimizer(optimizer_config(run), model)
    scheduler = build_scheduler(optimizer, run.schedule, run.optimizer)
    connect(model, optimizer, run)
    model[0].train()
    causal = as_sample(torch.randint(VOCABULARY, (starts.size(1), starts.size(2) + 1)))

    def step(more: dict[str, torch.Tensor]) -> None:
        train_step([iter([causal | more])], model, optimizer, scheduler, run)

    return {
        CAUSAL: lambda i: step({}),
        DOCUMENTS: lambda i: step({"document_starts": starts[i]}),
        MASK: lambda i: step({"document_starts": ~documents.shown(starts[i])}),
    }


def attention_alone(run: RunConfig, starts: torch.Tensor) -> dict[str, Contender]:
    """The kernel, forward and backward, at the shape of one layer."""
    _, batch, length = starts.shape
    model = run.model
    groups, width = model.query_groups, model.kv_channels
    per_group = model.num_attention_heads // groups
    dtype = run.precision.params_dtype
    qkv = torch.randn(length, batch, groups, (per_group + 2) * width, dtype=dtype, requires_grad=True)

    def run_once(given: torch.Tensor | None) -> None:
        out = attention.causal_attention(qkv, per_group, width, None, width**-0.5, starts=given)
        out.backward(torch.ones_like(out))

    return {CAUSAL: lambda i: run_once(None), DOCUMENTS: lambda i: run_once(starts[i])}


def shares(starts: torch.Tensor) -> tuple[float, float]:
    """(pairs, blocks) that documents leave, over those that are causal."""
    starts = starts.flatten(0, -2)
    places = torch.arange(starts.size(1))
    pairs = (places + 1 - starts).sum() / ((places + 1).sum() * len(starts))
    first = starts[:, ::BLOCK] // BLOCK  # of each block of queries
    blocks = torch.arange(first.size(1)) + 1
    return pairs.item(), ((blocks - first).sum() / (blocks.sum() * len(starts))).item()


def measured(contenders: dict[str, Contender], rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of the causal kind, and the others' times over it: medians over rounds, in rotating order."""
    names, seconds = list(contenders), {name: [] for name in contenders}
    for i in range(-1, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin = time.process_time()
            contenders[name](i)
            if i >= 0:  # the first round is not counted
                seconds[name].append(time.process_time() - begin)
    ratio = {
        name: statistics.median(x / y for x, y in zip(seconds[name], seconds[CAUSAL], strict=True))
        for name in names[1:]
    }
    return statistics.median(seconds[CAUSAL]), ratio


def measure(args: argparse.Namespace, length: int) -> dict:
    """One row of the table."""
    run = configuration(args, length)
    starts = packed(run, args.documents, args.rounds)
    pairs, blocks = shares(starts)
    seconds, step = measured(steps(run, starts), args.rounds)
    _, alone = measured(attention_alone(run, starts), args.rounds)
    return {
        "seq_length": length,
        "micro_batch_size": run.training.micro_batch_size,
        "pairs": pairs,
        "blocks": blocks,
        "attention": alone[DOCUMENTS],
        "causal_ms": seconds * 1e3,
        "documents": step[DOCUMENTS],
        "mask": step[MASK],
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seq-lengths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro batch")
    parser.add_argument(
        "--documents", type=float, default=0.25, help="mean length, as a share of the sequence"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every length asked for."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    distributed.initialize(configuration(args, args.seq_lengths[0]))  # one microbatch a step at any length
    rows = [measure(args, length) for length in tqdm(args.seq_lengths, leave=False, disable=None)]
    if args.json:
        print(json.dumps({"threads": args.threads, "torch": torch.__version__, "rows": rows}))
        return 0
    print(f"{args.preset}, {args.precision}; times relative to causal")
    print("sequence  batch  pairs  blocks  attention  step  step by mask  causal, ms a step")
    for row in rows:
        print(
            f"{row['seq_length']:8}  {row['micro_batch_size']:5}  {row['pairs']:5.2f}  {row['blocks']:6.2f}  "
            f"{row['attention']:9.2f}  {row['documents']:4.2f}  {row['mask']:12.2f}  {row['causal_ms']:17.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""What a teacher costs: steps with and without it, in turn, of one run.

    python benchmarks/distillation.py --rounds 9 -- --model-preset small --teacher-load PATH ...
    torchrun --nproc-per-node 2 benchmarks/distillation.py -- --tensor-model-parallel-size 2 ...

After -- come the flags of pretrain_pangu_pro.py. Printed are medians over the rounds: milliseconds and
processor time of a step (all threads of the first process), the ratio of each round's two steps, and what the
arithmetic says: 1 + N_teacher / (3 N_student), for a step is forward and backward of the student and forward
alone of the teacher. N counts the parameters of matrix products: embeddings that are looked up are left out.
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
from dataclasses import replace

from megatron_ext.arguments import parse_args
from megatron_ext.config.model import ModelConfig


def products(model: ModelConfig) -> int:
    """Parameters of matrix products: all but the embedding, whose rows are looked up."""
    rows = model.vocab_rows * model.hidden_size
    return model.num_parameters - (0 if model.tied else rows)


def measure(argv: list[str], rounds: int) -> dict[str, float]:
    """Steps in turn, after two of each that do not count."""
    from megatron_ext.training import distributed
    from megatron_ext.training.data import chunk_iterators
    from megatron_ext.training.distillation import OnlineTeacher
    from megatron_ext.training.loop import connect
    from megatron_ext.training.setup import build_trainer
    from megatron_ext.training.step import train_step

    run = parse_args(argv)
    distributed.initialize(run, distributed.rendezvous_store(run.process))
    trainer = build_trainer(run)
    connect(trainer.model, trainer.optimizer, run)
    teacher = next(each for each in trainer.callbacks if isinstance(each, OnlineTeacher))
    iterators = teacher.training_data(chunk_iterators(trainer.datasets[0], run, 0))
    flags, seconds, cpu = teacher.flags, {}, {}
    for turn in range(rounds + 2):
        for name, alpha in (("plain", 0.0), ("taught", flags.distillation_alpha)):
            teacher.flags = replace(flags, distillation_alpha=alpha)
            begun = time.perf_counter(), time.process_time()
            teacher.before_step(trainer)
            train_step(iterators, trainer.model, trainer.optimizer, trainer.scheduler, run)
            if turn >= 2:
                seconds.setdefault(name, []).append(time.perf_counter() - begun[0])
                cpu.setdefault(name, []).append(time.process_time() - begun[1])
    distributed.finalize()
    expected = 1 + products(teacher.teacher.config) / (3 * products(run.model))
    return {
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
        **{f"{name}_cpu_ms": 1e3 * statistics.median(values) for name, values in cpu.items()},
        "ratio": _ratio(seconds),
        "cpu_ratio": _ratio(cpu),
        "expected": expected,
        "cpu_over_expected": _ratio(cpu) / expected,
    }


def _ratio(values: dict[str, list[float]]) -> float:
    return statistics.median(b / a for a, b in zip(values["plain"], values["taught"], strict=True))


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9, metavar="N", help="pairs of steps (default 9)")
    p.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    asked = p.parse_args()
    found = measure(asked.flags, asked.rounds)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""The training step on one GPU: our model beside stock Megatron-Core, bf16 and FP8, with MFU.

    python benchmarks/gpu_step.py                                        # the bars: 1b-pro and 1.5b-pro
    python benchmarks/gpu_step.py --shapes 1.5b-pro --precisions bf16 --impls local
    python benchmarks/gpu_step.py --device cpu --shapes tiny --micro-batch-size 1 --steps 2     # rehearsal

Contenders, one after another, each in a process of its own: our model with the two PanGu-pi modules and
without them, and Megatron-Core's GPTModel with its own layer spec, all in the same trainer with the same
batch and optimizer. `--impls` are the local layers and Transformer Engine's, FP8 (tensorwise) only with
the latter; what is not installed is left out, with the reason. tokens/s is from the median step after
warm-up. MFU counts matmuls, causal attention as half, over the data sheet's dense bf16 peak of the GPU (also
for FP8, so that the two compare). A case that runs out of memory is tried again with half the micro batch,
and twice as many of them in a step. --output is written after every case. Nothing here has been measured yet.
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import itertools
import json
import statistics
import subprocess
import time
from pathlib import Path

CONTENDERS = ("pi on", "pi off", "stock")
PI_OFF = "--series-activation-order 0 --augmented-shortcuts 0"
VOCABULARY = 48000
#: Of an H100, for devices without a data sheet.
PEAK = 989e12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["1b-pro", "1.5b-pro"], metavar="PRESET")
    p.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=["fp32", "bf16", "fp8"])
    p.add_argument(
        "--impls",
        nargs="+",
        default=["local", "transformer_engine"],
        choices=["local", "transformer_engine"],
    )
    p.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    p.add_argument("--micro-batch-size", type=int, default=8, metavar="N")
    p.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of a step (default: 4)")
    p.add_argument("--steps", type=int, default=20, metavar="N", help="measured (default: 20)")
    p.add_argument("--warm-up", type=int, default=5, metavar="N", help="steps before (default: 5)")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu rehearses the script")
    p.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="S", help="begin no case after them"
    )
    p.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Measure every case; returns 0 if all of them ran."""
    options = parser().parse_args()
    if options.worker:
        print(json.dumps(measure(options, json.loads(options.worker))))
        return 0
    results, failed, begin = [], 0, time.monotonic()
    cases = itertools.product(options.shapes, options.impls, options.precisions, options.contenders)
    for shape, impl, precision, contender in cases:
        case = {"shape": shape, "impl": impl, "precision": precision, "contender": contender}
        reason = "no time is left" if time.monotonic() - begin > options.seconds else left_out(options, case)
        if reason:
            print(f"left out  {describe(case)}: {reason}")
            continue
        measured = measured_where_it_fits(options, case)
        if isinstance(measured, str):
            failed += 1
            print(f"failed    {describe(case)}: {measured}")
            continue
        results.append(measured)
        print(line(results[-1]), flush=True)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(bars(results)))
    return 1 if failed or not results else 0


def measured_where_it_fits(options: argparse.Namespace, case: dict) -> dict | str:
    """The result of a case at the largest micro batch that fits the memory, or why there is none."""
    size, error = options.micro_batch_size, ""
    while size:
        sized = case | {"micro_batch_size": size}
        command = [sys.executable, *sys.argv, "--worker", json.dumps(sized)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return sized | json.loads(done.stdout.splitlines()[-1])
        error = (done.stderr.strip().splitlines() or ["?"])[-1]
        if "out of memory" not in done.stderr.lower():
            return error
        size //= 2
    return error


def left_out(options: argparse.Namespace, case: dict) -> str | None:
    """Why a case cannot run here, or None."""
    from megatron_ext.platform import engine

    if case["precision"] == "fp8" and case["impl"] == "local":
        return "FP8 needs Transformer Engine"
    if case["impl"] == "transformer_engine":
        return engine.problem(options.device == "cuda")
    return None


def describe(case: dict) -> str:
    """A case in words."""
    return f"{case['shape']:<9} {case['impl']:<19} {case['precision']:<5} {case['contender']:<7}"


def line(result: dict) -> str:
    """A result in words."""
    return (
        f"measured  {describe(result)} {result['tokens_per_second']:>9,.0f} tokens/s  "
        f"MFU {result['mfu']:>6.1%}  {result['memory_bytes'] / 2**30:>5.1f} GiB  "
        f"micro batch {result['micro_batch_size']}  {result['device']}"
    )


def bars(results: list[dict]) -> list[str]:
    """What is asked for, beside what was measured in this run."""
    speed = {(r["shape"], r["impl"], r["precision"], r["contender"]): r["tokens_per_second"] for r in results}
    said = ["", "asked for, with Transformer Engine at the 1.5b-pro shape:"]
    key = ("1.5b-pro", "transformer_engine")
    mfu = [r["mfu"] for r in results if (r["shape"], r["impl"], r["precision"], r["contender"])
           == (*key, "bf16", "pi on")]  # fmt: skip
    for words, value, least in (
        ("MFU in bf16", mfu[0] if mfu else None, 0.45),
        ("FP8 over bf16", _ratio(speed, (*key, "fp8", "pi on"), (*key, "bf16", "pi on")), 1.15),
        ("pi on over pi off", _ratio(speed, (*key, "bf16", "pi on"), (*key, "bf16", "pi off")), 0.97),
        ("pi off over stock", _ratio(speed, (*key, "bf16", "pi off"), (*key, "bf16", "stock")), 1.0),
    ):
        if value is None:
            said.append(f"  {words:<18} not measured (at least {least})")
        else:
            said.append(
                f"  {words:<18} {value:.3f} (at least {least}): {'met' if value >= least else 'missed'}"
            )
    return said


def _ratio(speed: dict, first: tuple, second: tuple) -> float | None:
    return speed[first] / speed[second] if first in speed and second in speed else None


def measure(options: argparse.Namespace, case: dict) -> dict:
    """The median step of one case, in this process."""
    import torch

    from megatron_ext import platform
    from megatron_ext.planning.speed import data_sheet_flops

    step, run = trainer_step(options, case)
    for _ in range(options.warm_up):
        step()
    seconds = []
    for _ in range(options.steps):
        platform.synchronize()
        start = time.perf_counter()
        step()
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = run.training.global_batch_size * run.data.seq_length / statistics.median(seconds)
    peak = data_sheet_flops(platform.device_name(), half=True) or PEAK
    return {
        "tokens_per_second": tokens,
        "mfu": tokens * run.model.flops_per_token(run.data.seq_length) / peak,
        "memory_bytes": platform.max_memory_bytes(),
        "step_seconds": seconds,
        "device": platform.device_name(),
        "torch": torch.__version__,
    }


def flags_of(options: argparse.Namespace, case: dict) -> list[str]:
    """The trainer's command line for a case."""
    batch = options.micro_batch_size * options.micro_batches
    words = (
        f"--model-preset {case['shape']} --mock-data --tokenizer-type NullTokenizer --vocab-size "
        f"{VOCABULARY - 1} --micro-batch-size {case['micro_batch_size']} --global-batch-size {batch} "
        f"--train-iters 1000 --lr 1e-4 --weight-decay 0.1 --device {options.device} "
        f"--transformer-impl {case['impl']}"
    )
    words += "" if case["precision"] == "fp32" else " --bf16"
    words += " --fp8-format hybrid --fp8-recipe tensorwise" if case["precision"] == "fp8" else ""
    words += "" if case["contender"] == "pi on" else f" {PI_OFF}"
    return words.split()


def trainer_step(options: argparse.Namespace, case: dict):
    """(A function that takes one training step, the arguments it was built from)."""
    import torch
    from megatron.core.tensor_parallel import layers

    from megatron_ext.arguments.parser import read_args
    from megatron_ext.arguments.vocabulary import padded_vocab_size
    from megatron_ext.kernels.weight_gradient import provide_weight_gradients
    from megatron_ext.models.builder import build_model, ddp_config, wrap_for_training
    from megatron_ext.models.config import transformer_config
    from megatron_ext.training import distributed
    from megatron_ext.training.loop import connect
    from megatron_ext.training.optimizer import build_optimizer, optimizer_config
    from megatron_ext.training.schedule import build_scheduler
    from megatron_ext.training.step import train_step

    run = read_args(flags_of(options, case))
    run = run.but(padded_vocab_size=padded_vocab_size(VOCABULARY, run))
    distributed.initialize(run)
    config = transformer_config(run)
    if case["contender"] == "stock" and case["impl"] == "local":
        # Megatron-Core's own layers have it with Apex only.
        config.gradient_accumulation_fusion = layers._grad_accum_fusion_available
    provide_weight_gradients()
    chunks = [stock_model(config, run)] if case["contender"] == "stock" else build_model(config, run)
    model = wrap_for_training(chunks, config, ddp_config(run))
    optimizer = build_optimizer(optimizer_config(run), model)
    scheduler = build_scheduler(optimizer, run.schedule, run.optimizer)
    connect(model, optimizer, run)
    model[0].train()

    def samples():
        generator = torch.Generator().manual_seed(0)
        shape = (run.training.micro_batch_size, run.data.seq_length + 1)
        while True:
            ids = torch.randint(VOCABULARY, shape, generator=generator)
            tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            positions = torch.arange(run.data.seq_length).expand_as(tokens)
            yield {
                "tokens": tokens,
                "labels": labels,
                "loss_mask": torch.ones(tokens.shape),
                "position_ids": positions,
            }

    iterator = samples()
    return lambda: train_step([iterator], model, optimizer, scheduler, run), run


def stock_model(config, run):
    """Megatron-Core's GPTModel with the layer spec that it has for this implementation."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    from megatron_ext import platform
    from megatron_ext.models.initialization import initialize, mark_split_parameters

    local = run.layers.transformer_impl == "local"
    spec = (
        get_gpt_layer_local_spec(normalization=run.model.normalization)
        if local
        else get_gpt_layer_with_transformer_engine_spec()
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=run.model.padded_vocab_size,
        max_sequence_length=run.model.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
    )
    mark_split_parameters(model)
    initialize(model, config, run.init.seed)
    return model.to(platform.current_device())


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Check a command line before it is started: flags, memory of a device, time of a step.

    python tools/plan_run.py --world-size 8 --machine h100 -- --model-preset pangu-pi-1.5b-pro --bf16 ...
    python tools/plan_run.py --world-size 64 --machine h200 --suggest -- --model-preset pangu-pi-7b --bf16 ...
    python tools/plan_run.py --world-size 1024 --trace -- --model-preset pangu-pi-1.5b-pro --bf16 ...

After -- come the flags of pretrain_pangu_pro.py as they would be started with. They are read by its
own parser, for the machine that is asked about and not for this one. --suggest lists the fastest
layouts of so many devices that fit. Memory and time are estimates (docs/scaling.md says from what);
tools/doctor.py --speed measures a machine for --matmul-tflops and --link-gbytes. --trace runs a step of
one rank of the job, however large, by the trainer's own code over tensors without memory: what it computes
and keeps, beside what the arithmetic says, in seconds and without a GPU (with --transformer-impl local).

Exit code 0: the run can start; 1: it does not fit into the device; 2: the flags are wrong.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.arguments.parser import CommandLineError, read_args
from megatron_ext.arguments.stages import Planned, at_its_longest, plan_of_run, training_share
from megatron_ext.common import command
from megatron_ext.config import RunConfig, describe, footprint
from megatron_ext.config.model import ModelConfig
from megatron_ext.planning import communication, plan
from megatron_ext.planning.sources import amounts
from megatron_ext.training import trace

GIB = 2**30
#: For --trace without a rank, and the layers that can be traced.
FULLEST, TRACED = -1, ["--transformer-impl", "local"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__, "%(prog)s [options] -- FLAGS OF pretrain_pangu_pro.py")
    p.add_argument("--world-size", type=int, default=1, metavar="N", help="processes (default: 1)")
    p.add_argument(
        "--machine", choices=tuple(plan.MACHINES), default="h100", help="where it runs (default: h100)"
    )
    p.add_argument("--device-memory", type=float, metavar="GIB", help="of a device, if not the machine's")
    p.add_argument("--matmul-tflops", type=float, metavar="X", help="TFLOP/s that a device sustains")
    p.add_argument("--link-gbytes", type=float, metavar="X", help="GB/s one way between devices of a host")
    p.add_argument("--network-gbytes", type=float, metavar="X", help="GB/s one way between hosts, a device")
    p.add_argument("--suggest", action="store_true", help="list the fastest layouts that fit")
    p.add_argument(
        "--trace",
        type=int,
        nargs="?",
        const=FULLEST,
        metavar="RANK",
        help="run a step of this rank without memory (default: the first rank of the fullest pipeline stage)",
    )
    p.add_argument("--without-triton", action="store_true", help="the GPUs' machines have no Triton")
    p.add_argument(
        "--check-files", action="store_true", help="data, tokenizer and folders must be on this machine"
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    p.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        run = read_args(
            options.flags + TRACED * (options.trace is not None),
            world_size=options.world_size,
            device="cpu" if options.machine == "cpu" else "cuda",
            check_files=options.check_files,
        )
        stages = plan_of_run(run)
        run = at_its_longest(run)
        model = describe.with_vocabulary(run)
        layout = dataclasses.replace(describe.layout_of(run), kernels=not options.without_triton)
        found = {} if options.trace is None else {"trace": traced(options.trace, run, model, layout)}
    except CommandLineError as error:
        print(f"plan_run.py: the command line has problems:\n{error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"plan_run.py: error: {error}", file=sys.stderr)
        return 2
    measured = (options.device_memory, options.matmul_tflops, options.link_gbytes, options.network_gbytes)
    machine = machine_of(options.machine, *measured)
    summary = planned(run, model, layout, machine) | found
    summary |= of_stages(stages, run, model, layout, machine)
    if options.suggest:
        summary["suggestions"] = suggested(run, model, layout, machine)
    print(json.dumps(summary) if options.json else "\n".join(lines(summary)))
    return 0 if summary["fits"] or options.suggest and summary["suggestions"] else 1


def machine_of(
    name: str, memory: float | None, matmul: float | None, link: float | None, network: float | None
) -> plan.Machine:
    """The named machine with what was measured in its place, in GiB, TFLOP/s and GB/s."""
    machine = plan.MACHINES[name]
    if memory:
        machine = dataclasses.replace(machine, memory=memory * GIB)
    scale = ((matmul, 1e12), (link, 1e9), (network, 1e9))
    return machine.scaled(*(value and value * unit for value, unit in scale))


def traced(rank: int, run: RunConfig, model: ModelConfig, layout: describe.Layout) -> dict[str, Any]:
    """A step of one rank as it was traced, and what the arithmetic says of it.

    Raises:
        ValueError: there is no such rank, or no GPU is planned for.
    """
    if run.process.device == "cpu":
        raise ValueError("--trace shows what GPUs do: give another --machine")
    ranks = run.process.world_size
    if rank == FULLEST:
        rank = footprint.fullest_stage(model, layout) * ranks // layout.pipeline
    if not 0 <= rank < ranks:
        raise ValueError(f"--trace {rank}: the ranks are 0 to {ranks - 1}")
    begin = time.monotonic()
    seen = trace.trace(run, rank, triton=layout.kernels)
    tokens = layout.micro_batch * layout.micro_batches * layout.seq_length
    return {
        "seconds": time.monotonic() - begin,
        "rank": rank,
        "stage": seen.stage,
        "groups": seen.groups,
        "arithmetic": {
            "parameters": round(describe.parameters_of_rank(model, layout, seen.stage)),
            "flops": round(tokens * describe.flops_of_rank(model, layout, seen.stage)),
            "memory_bytes": footprint.memory_of_stage(model, layout, seen.stage),
        },
        "trace": {"parameters": seen.parameters, "flops": seen.flops, "memory_bytes": seen.memory},
    }


def planned(
    run: RunConfig, model: ModelConfig, layout: describe.Layout, machine: plan.Machine
) -> dict[str, Any]:
    """What the run is, and what it needs."""
    seconds = plan.step_seconds(model, layout, machine, run.parallel.overlap_grad_reduce)
    tokens = run.training.global_batch_size * run.data.seq_length
    return {
        "processes": run.process.world_size,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "parameters": model.num_parameters,
        "teacher": run.distillation.teacher_load if run.distillation.is_taught else None,
        "iterations": run.training.train_iters,
        "tokens": run.training.train_iters * tokens,
        "memory_bytes": footprint.memory(model, layout),
        "device_memory_bytes": machine.memory,
        "fits": plan.fits(model, layout, machine),
        "bytes_sent": communication.bytes_sent(model, layout),
        "step_seconds": seconds,
        "tokens_per_second_per_device": tokens / sum(seconds.values()) / run.process.world_size,
    }


def of_stages(
    stages: Sequence[Planned],
    run: RunConfig,
    model: ModelConfig,
    layout: describe.Layout,
    machine: plan.Machine,
) -> dict[str, Any]:
    """The stages of a run, each with what it reads of its sources; what all of them read, and how long."""
    if not stages:
        return {}
    found, seconds = [], 0.0
    sources: dict[str, dict[str, Any]] = {}
    for stage in stages:
        there = dataclasses.replace(layout, seq_length=stage.seq_length)
        step = plan.step_seconds(model, there, machine, run.parallel.overlap_grad_reduce)
        seconds += sum(step.values()) * (stage.end.iteration - stage.begin.iteration)
        read = [vars(each) for each in amounts(stage.stage, stage.tokens, training_share(run))]
        for each in read:
            so_far = sources.setdefault(each["prefix"], {"tokens": 0.0, "epochs": 0.0})
            so_far["tokens"] += each["tokens"]
            so_far["epochs"] = None if each["epochs"] is None else so_far["epochs"] + each["epochs"]
        found.append(
            {
                "name": stage.stage.name,
                "iterations": [stage.begin.iteration, stage.end.iteration],
                "samples": stage.samples,
                "seq_length": stage.seq_length,
                "tokens": stage.tokens,
                "sources": read,
            }
        )
    tokens = sum(stage.tokens for stage in stages)
    return {"stages": found, "sources": sources, "tokens": tokens, "seconds": seconds}


def suggested(
    run: RunConfig, model: ModelConfig, like: describe.Layout, machine: plan.Machine
) -> list[dict[str, Any]]:
    """The ten fastest layouts that fit, as flags, the best micro batch of each division."""
    found, seen = [], set()
    kind = (like.seq_length, like.bytes_each, like.kernels)
    devices, batch = run.process.world_size, run.training.global_batch_size
    layouts = plan.suggestions(model, devices, batch, machine, *kind)
    for seconds, layout in layouts:
        division = (layout.tensor, layout.pipeline)
        if division not in seen:
            seen.add(division)
            used = sum(footprint.memory(model, layout).values())
            found.append({"seconds": seconds, "memory_bytes": used, "flags": flags(layout), **vars(layout)})
    return list(itertools.islice(found, 10))


def flags(layout: describe.Layout) -> str:
    """The layout as flags of the trainer."""
    words = f"--tensor-model-parallel-size {layout.tensor} --pipeline-model-parallel-size {layout.pipeline}"
    words += f" --micro-batch-size {layout.micro_batch}"
    words += " --sequence-parallel" * layout.sequence_parallel
    words += " --use-distributed-optimizer" * layout.distributed_optimizer
    full = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    return words + full * layout.recompute


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary to read."""
    memory, limit = summary["memory_bytes"], summary["device_memory_bytes"]
    seconds = summary["step_seconds"]
    found = [
        "every flag is understood",
        f"{summary['parameters']:,} parameters on {summary['processes']} devices: "
        f"tensor {summary['tensor']} x pipeline {summary['pipeline']} x data {summary['data']}",
        f"{summary['iterations']:,} iterations, {summary['tokens']:,} tokens",
        *stage_lines(summary.get("stages", []), summary.get("sources", {})),
        "memory of the fullest device (activations are an estimate)",
        *(f"  {part:<18}{size / GIB:>9.2f} GiB" for part, size in memory.items()),
        f"  {'total':<18}{sum(memory.values()) / GIB:>9.2f} GiB of {limit / GIB:.0f}",
        "time of a step (an estimate)",
        *(f"  {part:<18}{1000 * value:>9.1f} ms" for part, value in seconds.items()),
        f"  {'total':<18}{1000 * sum(seconds.values()):>9.1f} ms, "
        f"{summary['tokens_per_second_per_device']:,.0f} tokens/s per device, "
        f"{hours(summary):,.1f} hours in all",
    ]
    found += trace_lines(summary["trace"]) if "trace" in summary else []
    if summary["teacher"] is not None:
        found.append(f"the teacher of --teacher-load {summary['teacher']} is not counted")
    if not summary["fits"]:
        found.append(
            "this does not fit: lower --micro-batch-size, use --recompute-granularity full, "
            "--use-distributed-optimizer, or a larger tensor or pipeline parallel size (--suggest)"
        )
    for number, layout in enumerate(summary.get("suggestions", ()), 1):
        head = "layouts that fit, fastest first\n" if number == 1 else ""
        size = layout["memory_bytes"] / GIB
        found.append(
            f"{head}{number:>3}. {1000 * layout['seconds']:>8.1f} ms {size:>6.1f} GiB  {layout['flags']}"
        )
    if summary.get("suggestions") == []:
        found.append("no layout of so many devices fits")
    return found


def hours(summary: dict[str, Any]) -> float:
    """The time of all steps."""
    return summary.get("seconds", sum(summary["step_seconds"].values()) * summary["iterations"]) / 3600


def stage_lines(stages: list[dict[str, Any]], sources: dict[str, dict[str, Any]]) -> list[str]:
    """Each stage with what it reads of each source, and the sums."""

    def line(prefix: str, tokens: float, epochs: float | None) -> str:
        return f"  {Path(prefix).name:<28}{tokens:>18,.0f} tokens" + (
            "" if epochs is None else f"{epochs:>10.3g} epochs"
        )

    found = []
    for stage in stages if len(stages) > 1 else []:
        first, last = stage["iterations"]
        found.append(
            f"stage {stage['name']}, iterations {first + 1:,} to {last:,}: {stage['samples']:,} samples of "
            f"{stage['seq_length']} tokens"
        )
        found += [line(**source) for source in stage["sources"]]
    found += ["all stages"] if found else []
    return found + [line(prefix, **read) for prefix, read in sources.items()]


def trace_lines(found: dict[str, Any]) -> list[str]:
    """Arithmetic and trace side by side."""
    sides = [found["arithmetic"], found["trace"]]
    memory = [side["memory_bytes"] | {"total": sum(side["memory_bytes"].values())} for side in sides]
    rows = [
        ("parameters", *(f"{side['parameters']:,}" for side in sides)),
        ("TFLOP", *(f"{side['flops'] / 1e12:,.3f}" for side in sides)),
        *((f"{part}, GiB", *(f"{side[part] / GIB:.2f}" for side in memory)) for part in memory[0]),
    ]
    return [
        f"a step of rank {found['rank']} (stage {found['stage']}), traced in {found['seconds']:.0f} s",
        *(f"  {name:<18}{said:>16}{seen:>16}" for name, said, seen in [("", "arithmetic", "trace"), *rows]),
        *(f"  {name + ' group':<18}{in_words(ranks):>32}" for name, ranks in found["groups"].items()),
    ]


def in_words(ranks: list[int]) -> str:
    """All of a few, or the first and the last."""
    shown = ranks if len(ranks) <= 4 else [*ranks[:2], "...", ranks[-1]]
    return f"{len(ranks)} rank{'s' * (len(ranks) > 1)}: {', '.join(map(str, shown))}"


if __name__ == "__main__":
    sys.exit(main())

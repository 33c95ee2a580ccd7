#!/usr/bin/env python3
"""Check a command line before it is started: every flag, and the memory a device needs.

    python tools/plan_run.py --world-size 8 -- --model-preset pangu-pi-1.5b-pro --bf16 ...

After -- come the flags of pretrain_pangu_pro.py as they would be started with. They are read by its
own parser, for the machine that is asked about and not for this one. Memory is an estimate.

Exit code 0: the run can start; 1: it does not fit into --device-memory; 2: the flags are wrong.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.arguments.parser import CommandLineError, read_args
from megatron_ext.models import describe

GIB = 2**30


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        usage="%(prog)s [options] -- FLAGS OF pretrain_pangu_pro.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--world-size", type=int, default=1, metavar="N", help="processes (default: 1)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it runs (default: cuda)")
    p.add_argument(
        "--device-memory", type=float, default=80.0, metavar="GIB", help="of a device (default: 80)"
    )
    p.add_argument(
        "--check-files", action="store_true", help="data, tokenizer and folders must be on this machine"
    )
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    p.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        args = read_args(
            options.flags,
            world_size=options.world_size,
            device=options.device,
            check_files=options.check_files,
        )
    except CommandLineError as error:
        print(f"plan_run.py: the command line has problems:\n{error}", file=sys.stderr)
        return 2
    summary = plan(args, options)
    print(json.dumps(summary) if options.json else "\n".join(lines(summary)))
    return 0 if summary["fits"] else 1


def plan(args: argparse.Namespace, options: argparse.Namespace) -> dict:
    """What the run is, and what it needs."""
    shape, layout = describe.shape_of(args, describe.vocabulary_of(args)), describe.layout_of(args)
    needed = describe.memory(shape, layout)
    return {
        "processes": args.world_size,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "parameters": describe.total_parameters(shape),
        "iterations": args.train_iters,
        "tokens": args.train_iters * args.global_batch_size * args.seq_length,
        "memory_bytes": needed,
        "device_memory_bytes": options.device_memory * GIB,
        "fits": sum(needed.values()) < options.device_memory * GIB,
    }


def lines(summary: dict) -> list[str]:
    """The summary to read."""
    memory, limit = summary["memory_bytes"], summary["device_memory_bytes"]
    found = [
        "every flag is understood",
        f"{summary['parameters']:,} parameters on {summary['processes']} devices: "
        f"tensor {summary['tensor']} x pipeline {summary['pipeline']} x data {summary['data']}",
        f"{summary['iterations']:,} iterations, {summary['tokens']:,} tokens",
        "memory of the fullest device (activations are an estimate)",
        *(f"  {part:<12}{size / GIB:>9.2f} GiB" for part, size in memory.items()),
        f"  {'total':<12}{sum(memory.values()) / GIB:>9.2f} GiB of {limit / GIB:.0f}",
    ]
    if not summary["fits"]:
        found.append(
            "this does not fit: lower --micro-batch-size, use --recompute-granularity full, "
            "--use-distributed-optimizer, or a larger tensor or pipeline parallel size"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Does a parallel layout compute what one process computes? The user's own command, for a few steps.

    python tools/verify_layout.py --nproc-per-node 4 -- --tensor-model-parallel-size 2 \\
        --pipeline-model-parallel-size 2 --model-preset tiny ...

After -- come the flags of pretrain_pangu_pro.py. They run for --steps steps as one process and at their
layout, from the same weights on the same samples. Losses, gradient norms, every gradient and every parameter
are compared, and copies of one tensor on several ranks with each other. Dropout is off, as it differs by
layout; a command with dropout runs a third time, for the copies alone. Nothing is saved or logged.

On a cluster, where one launcher cannot start both, record and compare by hand:

    python tools/verify_layout.py --record one --one-process --world-size 64 -- FLAGS
    srun ... torchrun ... tools/verify_layout.py --record many -- FLAGS      # a folder that all hosts share
    python tools/verify_layout.py --compare one many

Exit code 0: the same; 1: not the same, or a run failed; 2: bad usage.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command

#: Lines of differences that are printed.
SHOWN = 12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__, "%(prog)s [options] -- FLAGS OF pretrain_pangu_pro.py")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--nproc-per-node", type=int, metavar="N", help="verify on N processes of this host")
    what.add_argument("--record", type=Path, metavar="DIR", help="record into this folder, under a launcher")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar="DIR", help="compare the record of one process with another"
    )
    p.add_argument("--steps", type=int, default=3, metavar="N", help="steps to run (default: 3)")
    p.add_argument("--one-process", action="store_true", help="with --record: without the layout")
    p.add_argument("--world-size", type=int, metavar="N", help="with --one-process: processes of the layout")
    p.add_argument("--dropout", action="store_true", help="with --record: keep the dropout of the flags")
    p.add_argument("--json", action="store_true", help="print the verdict as one JSON object")
    p.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = parser()
    asked = p.parse_args(argv)
    if asked.steps < 1:
        p.error(f"--steps {asked.steps}: must be at least 1")
    if asked.one_process != (asked.world_size is not None) or (asked.one_process and not asked.record):
        p.error("--record DIR --one-process --world-size N belong together")
    if asked.record:
        return record(asked)
    if asked.compare:
        return verdict(asked.compare[0], asked.compare[1], None, asked.json)
    if asked.nproc_per_node < 2:
        p.error(f"--nproc-per-node {asked.nproc_per_node}: a layout has at least 2 processes")
    with tempfile.TemporaryDirectory(prefix="verify_layout_") as folder:
        return verify(asked, Path(folder))


def record(asked: argparse.Namespace) -> int:
    """One of the runs."""
    from megatron_ext.arguments.parser import CommandLineError
    from megatron_ext.training import distributed, layout_check

    try:
        run = layout_check.settings(
            asked.flags, asked.world_size, one_process=asked.one_process, dropout=asked.dropout
        )
    except CommandLineError as error:
        print(f"verify_layout.py: the command line has problems:\n{error}", file=sys.stderr)
        return 2
    asked.record.mkdir(parents=True, exist_ok=True)
    layout_check.record(run, asked.record, asked.steps)
    distributed.finalize()
    return 0


def verify(asked: argparse.Namespace, folder: Path) -> int:
    """All runs on this host, and the verdict."""
    processes = str(asked.nproc_per_node)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    one, many, dropout = folder / "one", folder / "many", folder / "dropout"
    runs = [
        ("one process", [], one, ["--one-process", "--world-size", processes]),
        ("the layout", launcher, many, []),
    ]
    if _has_dropout(asked.flags):
        runs.append(("the layout with dropout", launcher, dropout, ["--dropout"]))
    for name, program, output, options in runs:
        print(f"verify_layout.py: {asked.steps} steps of {name} ...", file=sys.stderr, flush=True)
        words = ["--record", str(output), "--steps", str(asked.steps), *options, "--", *asked.flags]
        command_line = [sys.executable, *program, __file__, *words]
        code = subprocess.run(command_line, stdout=subprocess.DEVNULL, env=_environment()).returncode
        if code:
            print(f"verify_layout.py: the run of {name} failed", file=sys.stderr)
            return code if code == 2 else 1
    return verdict(one, many, dropout if dropout.exists() else None, asked.json)


def _has_dropout(flags: list[str]) -> bool:
    """Whether the command drops anything, as Megatron-LM's defaults do."""
    from megatron_ext.arguments import make_parser
    from megatron_ext.arguments.parser import with_defaults

    values = with_defaults(vars(make_parser().parse_known_args(flags)[0]), [])
    return bool(values["attention_dropout"] or values["hidden_dropout"])


def _environment() -> dict[str, str]:
    """This process's, without a launcher's words: a job of one process may run under SLURM."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}


def verdict(one: Path, many: Path, dropout: Path | None, as_json: bool) -> int:
    """Compare, and print what came out."""
    from megatron_ext.training import layout_check

    reference, layout = layout_check.Record(one), layout_check.Record(many)
    differences = layout_check.compare(reference, layout)
    if dropout is not None:
        differences += layout_check.replicas(layout_check.Record(dropout))
    same = not differences
    if as_json:
        print(json.dumps({"same": same, "differences": [vars(one) for one in differences]}))
        return 0 if same else 1
    print(f"losses of one process: {' '.join(f'{loss:.6f}' for loss in reference.losses())}")
    print(f"losses of the layout:  {' '.join(f'{loss:.6f}' for loss in layout.losses())}")
    for one_of in differences[:SHOWN]:
        print(f"  {one_of}")
    if len(differences) > SHOWN:
        print(f"  ... and {len(differences) - SHOWN} more")
    tensors = len(reference.shards(1)) * reference.steps
    print(
        f"THE SAME: {tensors} gradients and parameters agree to {layout.tolerance:g}, relative"
        if same
        else f"NOT THE SAME: {len(differences)} differences (tolerance {layout.tolerance:g}, relative)"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

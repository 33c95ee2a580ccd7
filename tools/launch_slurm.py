#!/usr/bin/env python3
"""Check a run, then hand it to SLURM with examples/slurm/pretrain.sbatch.

    python tools/launch_slurm.py --nodes 4 --gpus-per-node 8 --time 24:00:00 --dry-run -- \\
        examples/run_1.5b.sh checkpoints tensorboard compact.model data/my_text_document
    python tools/launch_slurm.py --nodes 1 --gpus-per-node 8 -- --model-preset small ... \\
        --save runs/a --load runs/a --save-interval 500
    python tools/launch_slurm.py --nodes 1 --gpus-per-node 8 --sweep "--lr 1e-3" "--lr 2e-3" -- \\
        --model-preset small ... --save runs/%a --load runs/%a --save-interval 500

After -- comes a run script with its arguments, or the flags of pretrain_pangu_pro.py. Flags are read
by its own parser for the processes that the job will have; --dry-run then prints the sbatch command
and submits nothing. The job saves and requeues itself 2 minutes ahead of its time limit. A sweep is
an array job, one task for each set of flags; %a in a word becomes the number of the task.

Exit code 0: submitted, or checked; 1: SLURM refused or is not there; 2: bad usage.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_ext.arguments.parser import CommandLineError, read_args
from megatron_ext.common import command
from megatron_ext.platform import Device

BATCH_SCRIPT = REPOSITORY / "examples" / "slurm" / "pretrain.sbatch"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__, "%(prog)s [options] -- RUN_SCRIPT ARGUMENT...  |  FLAG...")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs, and processes, of a node")
    where.add_argument("--cpus-per-node", type=int, metavar="N", help="without GPUs: processes of a node")
    p.add_argument("--time", metavar="LIMIT", help="time limit of the job, such as 24:00:00")
    p.add_argument("--job-name", default="pangu-pro", metavar="NAME", help="(default: pangu-pro)")
    p.add_argument("--partition", metavar="NAME", help="partition of the cluster")
    p.add_argument("--account", metavar="NAME", help="account that is charged")
    p.add_argument(
        "--sbatch",
        nargs="+",
        default=[],
        metavar="WORD",
        help="more options of sbatch, written as --sbatch=X",
    )
    p.add_argument("--log-dir", default="slurm-logs", metavar="FOLDER", help="(default: slurm-logs)")
    p.add_argument("--sweep", nargs="+", default=[], metavar="FLAGS", help="flags of each task, in quotes")
    p.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    p.add_argument("run", nargs="*", help=argparse.SUPPRESS)
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:split])
    run = words[split + 1 :]
    problems = usage_problems(options, run) or run_problems(options, run)
    if problems:
        print("launch_slurm.py: error:\n" + "\n".join(problems), file=sys.stderr)
        return 2
    sweep_file = Path(options.log_dir, f"sweep-{time.strftime('%Y%m%d-%H%M%S')}.txt").absolute()
    words = sbatch_command(options, run, sweep_file)
    summary = {"command": words, "sweep": options.sweep, "job": None}
    if not options.dry_run:
        summary["job"] = submit(words, options.sweep, sweep_file)
    job = f"submitted as job {summary['job']}" if summary["job"] else "checked, not submitted"
    print(json.dumps(summary) if options.json else f"{shlex.join(words)}\n{job}")
    return 0


def usage_problems(options: argparse.Namespace, run: list[str]) -> list[str]:
    """What is wrong with the options themselves."""
    found = []
    for name in ("nodes", "gpus_per_node", "cpus_per_node"):
        value = getattr(options, name)
        if value is not None and value < 1:
            found.append(f"--{name.replace('_', '-')} must be at least 1")
    if not run:
        found.append("after -- give a run script with its arguments, or the flags of pretrain_pangu_pro.py")
    elif not run[0].startswith("--") and not Path(run[0]).is_file():
        found.append(f"{run[0]}: there is no such run script")
    if options.sweep and not any("%a" in word for word in run):
        found.append("--sweep: the tasks would write into one folder; put %a into the path, such as runs/%a")
    return found


def run_problems(options: argparse.Namespace, run: list[str]) -> list[str]:
    """What is wrong with the run, for every task of a sweep."""
    found = []
    for number, extra in enumerate(options.sweep or [""]):
        words = [word.replace("%a", str(number)) for word in run] + extra.split()
        check = flag_problems if run[0].startswith("--") else script_problems
        found += [f"task {number}: {p}" if options.sweep else p for p in check(options, words)]
    return found


def flag_problems(options: argparse.Namespace, flags: list[str]) -> list[str]:
    """The parser's problems with the flags, and a run that would start over when it is requeued."""
    processes = options.nodes * (options.gpus_per_node or options.cpus_per_node)
    device: Device = "cuda" if options.gpus_per_node else "cpu"
    try:
        run = read_args(flags, world_size=processes, device=device)
    except CommandLineError as error:
        return [f"  - {problem}" for problem in error.problems]
    checkpoint = run.checkpoint
    if checkpoint.save is None or checkpoint.load != checkpoint.save:
        return ["  - a requeued job goes on from --load: give --save FOLDER and --load of the same folder"]
    if (step := checkpoint.ckpt_step) is not None:
        return [
            f"  - a requeued job would go back to --ckpt-step {step} each time: leave it out, and write "
            f"{step} into latest_checkpointed_iteration.txt of --save to go back once"
        ]
    return []


def script_problems(options: argparse.Namespace, words: list[str]) -> list[str]:
    """What the run script itself says when it only checks (DRY_RUN=1)."""
    settings = {"NUM_NODES": str(options.nodes), "NODE_RANK": "0", "DRY_RUN": "1"}
    settings["GPUS_PER_NODE"] = str(options.gpus_per_node or options.cpus_per_node)
    done = subprocess.run(["bash", *words], env=os.environ | settings, capture_output=True, text=True)
    return [] if done.returncode == 0 else [done.stderr.strip() or done.stdout.strip()]


def sbatch_command(options: argparse.Namespace, run: list[str], sweep_file: Path) -> list[str]:
    """The sbatch command that starts the run."""
    logs = Path(options.log_dir).absolute()
    exported = ["ALL", f"PANGU_HOME={REPOSITORY}"]
    command = ["sbatch", "--parsable", f"--nodes={options.nodes}", f"--job-name={options.job_name}"]
    if options.gpus_per_node:
        command.append(f"--gpus-per-node={options.gpus_per_node}")
    else:
        command.append(f"--cpus-per-task={options.cpus_per_node}")
        exported.append(f"GPUS_PER_NODE={options.cpus_per_node}")
    for name in ("time", "partition", "account"):
        if getattr(options, name):
            command.append(f"--{name}={getattr(options, name)}")
    if options.sweep:
        command.append(f"--array=0-{len(options.sweep) - 1}")
        exported.append(f"SWEEP_FILE={sweep_file}")
    command += [f"--output={logs}/{'%x-%A_%a' if options.sweep else '%x-%j'}.out"]
    return [*command, f"--export={','.join(exported)}", *options.sbatch, str(BATCH_SCRIPT), *run]


def submit(command: list[str], sweep: list[str], sweep_file: Path) -> str:
    """Submit; the number of the job.

    Raises:
        OSError: there is no sbatch here, the log folder cannot be written, or SLURM refused the job.
    """
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(
            "not submitted: there is no sbatch on this machine; run this on a login node of the cluster"
        )
    sweep_file.parent.mkdir(parents=True, exist_ok=True)
    if sweep:
        sweep_file.write_text("".join(f"{flags}\n" for flags in sweep), encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ChildProcessError(f"not submitted: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]


if __name__ == "__main__":
    sys.exit(main())

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
from dataclasses import dataclass
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
    job = command.made(Job, options, run=words[split + 1 :])
    if problems := job.usage_problems() or job.run_problems():
        print("launch_slurm.py: error:\n" + "\n".join(problems), file=sys.stderr)
        return 2
    sweep_file = Path(options.log_dir, f"sweep-{time.strftime('%Y%m%d-%H%M%S')}.txt").absolute()
    words = job.sbatch_command(sweep_file)
    summary = {"command": words, "sweep": options.sweep, "job": None}
    if not options.dry_run:
        summary["job"] = submit(words, options.sweep, sweep_file)
    done = f"submitted as job {summary['job']}" if summary["job"] else "checked, not submitted"
    print(json.dumps(summary) if options.json else f"{shlex.join(words)}\n{done}")
    return 0


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for, by the names of the flags, and the words of the ``run``."""

    nodes: int
    gpus_per_node: int | None
    cpus_per_node: int | None
    time: str | None
    job_name: str
    partition: str | None
    account: str | None
    sbatch: list[str]
    log_dir: str
    sweep: list[str]
    run: list[str]

    def usage_problems(self) -> list[str]:
        """What is wrong with the options themselves."""
        found = []
        for name in ("nodes", "gpus_per_node", "cpus_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name.replace('_', '-')} must be at least 1")
        if not self.run:
            found.append(
                "after -- give a run script with its arguments, or the flags of pretrain_pangu_pro.py"
            )
        elif not self.run[0].startswith("--") and not Path(self.run[0]).is_file():
            found.append(f"{self.run[0]}: there is no such run script")
        if self.sweep and not any("%a" in word for word in self.run):
            found.append(
                "--sweep: the tasks would write into one folder; put %a into the path, such as runs/%a"
            )
        return found

    def run_problems(self) -> list[str]:
        """What is wrong with the run, for every task of a sweep."""
        found = []
        for number, extra in enumerate(self.sweep or [""]):
            words = [word.replace("%a", str(number)) for word in self.run] + extra.split()
            check = self.flag_problems if self.run[0].startswith("--") else self.script_problems
            found += [f"task {number}: {p}" if self.sweep else p for p in check(words)]
        return found

    def flag_problems(self, flags: list[str]) -> list[str]:
        """The parser's problems with the flags, and a run that would start over when it is requeued."""
        processes = self.nodes * (self.gpus_per_node or self.cpus_per_node or 1)
        device: Device = "cuda" if self.gpus_per_node else "cpu"
        try:
            run = read_args(flags, world_size=processes, device=device)
        except CommandLineError as error:
            return [f"  - {problem}" for problem in error.problems]
        checkpoint = run.checkpoint
        if checkpoint.save is None or checkpoint.load != checkpoint.save:
            return [
                "  - a requeued job goes on from --load: give --save FOLDER and --load of the same folder"
            ]
        if (step := checkpoint.ckpt_step) is not None:
            return [
                f"  - a requeued job would go back to --ckpt-step {step} each time: leave it out, and write "
                f"{step} into latest_checkpointed_iteration.txt of --save to go back once"
            ]
        return []

    def script_problems(self, words: list[str]) -> list[str]:
        """What the run script itself says when it only checks (DRY_RUN=1)."""
        settings = {"NUM_NODES": str(self.nodes), "NODE_RANK": "0", "DRY_RUN": "1"}
        settings["GPUS_PER_NODE"] = str(self.gpus_per_node or self.cpus_per_node)
        done = subprocess.run(["bash", *words], env=os.environ | settings, capture_output=True, text=True)
        return [] if done.returncode == 0 else [done.stderr.strip() or done.stdout.strip()]

    def sbatch_command(self, sweep_file: Path) -> list[str]:
        """The sbatch command that starts the run."""
        logs = Path(self.log_dir).absolute()
        exported = ["ALL", f"PANGU_HOME={REPOSITORY}"]
        command = ["sbatch", "--parsable", f"--nodes={self.nodes}", f"--job-name={self.job_name}"]
        if self.gpus_per_node:
            command.append(f"--gpus-per-node={self.gpus_per_node}")
        else:
            command.append(f"--cpus-per-task={self.cpus_per_node}")
            exported.append(f"GPUS_PER_NODE={self.cpus_per_node}")
        for name in ("time", "partition", "account"):
            if getattr(self, name):
                command.append(f"--{name}={getattr(self, name)}")
        if self.sweep:
            command.append(f"--array=0-{len(self.sweep) - 1}")
            exported.append(f"SWEEP_FILE={sweep_file}")
        command += [f"--output={logs}/{'%x-%A_%a' if self.sweep else '%x-%j'}.out"]
        return [*command, f"--export={','.join(exported)}", *self.sbatch, str(BATCH_SCRIPT), *self.run]


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

#!/usr/bin/env python
"""The whole training step beside what people would use instead: same shapes, same batch, same optimizer.

    python benchmarks/train_step.py                                   # small, fp32, one process
    python benchmarks/train_step.py --shapes tiny small wide --precisions fp32 bf16 --processes 1 2
    python benchmarks/train_step.py --rounds 9 --output runs/step --json

Contenders, each in processes of its own (memory is then its own too), taking steps in turn, round after
round, so that all meet the same machine:

  ours, pi on         this project's model and trainer with series activation and augmented shortcut
  ours, pi off        the same without the two modules: a plain Llama
  stock GPTModel      Megatron-Core's model with its local layers, rotary embedding and choice of optimizer
                      (torch's AdamW), in the same trainer
  transformers Llama  LlamaForCausalLM with SDPA and torch's fused AdamW (bf16: autocast)

Shapes: `tiny` and `small` as in the presets, `wide` is one layer of 1.5b-pro (hidden 2048, FFN 6912,
sequence 1024, vocabulary 8192). With two processes Megatron-Core's contenders split the model (TP2), one
thread each; transformers has no tensor parallelism on a CPU and splits the batch instead.

Every step is forward, backward, clipping and AdamW. tokens/s is from the median over rounds; the spread is
half the distance between the quartiles. "CPU" is processor time over all threads, the fairer number on a
machine that others use too (with --threads 1: threads that wait spin). MFU counts matmuls (causal attention
as half) over the rate of a 1024 x 1024 matmul measured by the parent in every round. Memory in MiB,
summed over a contender's processes: "resident" is the peak of what the system gave it after its imports, with
whatever the C library keeps or cannot use; "allocated" the peak of what was in use during a step.
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.train_step_worker import CONTENDERS, SHAPES

WORKER = Path(__file__).with_name("train_step_worker.py")
OURS_ON, OURS_OFF, STOCK, LLAMA = CONTENDERS
QUIET = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One setting in which all contenders are measured."""

    shape: str
    precision: str
    processes: int

    def __str__(self) -> str:
        layout = "1 process" if self.processes == 1 else f"TP{self.processes}"
        return f"{self.shape}, {self.precision}, {layout}"


@dataclass
class Contender:
    """The processes of one contender, and what was measured of it."""

    name: str
    ranks: list[subprocess.Popen]
    info: list[dict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def hear(self) -> list[dict]:
        """One answer from every rank."""
        answers = [rank.stdout.readline() for rank in self.ranks]
        if not all(answers):
            raise RuntimeError(f"a process of '{self.name}' ended; its message is above")
        return [json.loads(answer) for answer in answers]

    def tell(self, command: str) -> list[dict]:
        """Send a command to every rank and wait for all answers."""
        for rank in self.ranks:
            rank.stdin.write(command + "\n")
            rank.stdin.flush()
        return self.hear()

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds a step: of the slowest rank, and of processor time over all ranks and threads."""
        answers = self.tell(f"step {steps}")
        self.losses.append(answers[-1]["loss"])
        return max(a["seconds"] for a in answers) / steps, sum(a["cpu"] for a in answers) / steps

    def end(self) -> None:
        """Take the peak of memory and let the processes go."""
        peaks = self.tell("end")
        self.memory = {kind: sum(peak[kind] for peak in peaks) / 2**20 for kind in peaks[0]}
        for rank in self.ranks:
            rank.wait(60)


def start(name: str, case: Case, args: argparse.Namespace, folder: Path) -> Contender:
    """Start the processes of a contender; they build their model at once."""
    threads = max(1, args.threads // case.processes)
    meeting = folder / f"{name.replace(' ', '-')}.store"
    options = {
        "--contender": name,
        "--shape": case.shape,
        "--precision": case.precision,
        "--world": case.processes,
        "--threads": threads,
        "--micro-batch-size": args.micro_batch_size,
        "--micro-batches": args.micro_batches,
        "--meeting-file": meeting,
    }
    words = [str(word) for option in options.items() for word in option]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *words, "--rank", str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)},
        )
        for rank in range(case.processes)
    ]
    return Contender(name, ranks)


def matmul_rate(dtype: torch.dtype, n: int = 1024, repeats: int = 12) -> float:
    """Floating point operations per second of the best of some matmuls."""
    a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def measure(case: Case, args: argparse.Namespace) -> dict:
    """Run all contenders of a case in turn; its summary."""
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in args.contenders:  # built one after the other, so that none waits for memory
                contenders.append(start(name, case, args, Path(folder)))
                contenders[-1].info = contenders[-1].hear()
            peak = take_turns(contenders, case, args)
            for contender in contenders:
                contender.end()
        finally:
            for contender in contenders:
                for rank in contender.ranks:
                    rank.kill()
    return summary(case, contenders, peak, args)


def take_turns(contenders: list[Contender], case: Case, args: argparse.Namespace) -> float:
    """Every contender in turn, round after round, in rotating order; the best matmul rate seen."""
    for contender in contenders:
        contender.run(1)
    steps = max(1, round(args.turn_seconds / contenders[0].run(1)[0]))
    peak = 0.0
    for i in tqdm(range(args.rounds), desc=str(case), leave=False, disable=None):
        peak = max(peak, matmul_rate(DTYPES[case.precision]))
        turn = i % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            seconds, cpu = contender.run(steps)
            contender.seconds.append(seconds)
            contender.cpu.append(cpu)
    return peak


def summary(case: Case, contenders: list[Contender], peak: float, args: argparse.Namespace) -> dict:
    """Numbers of each contender and the ratios between them, taken round by round."""
    from megatron_ext.config.presets import preset

    sequence = {"wide": 1024}.get(case.shape) or preset(case.shape).max_position_embeddings
    tokens = args.micro_batch_size * args.micro_batches * sequence
    rows = {}
    for c in contenders:
        median = statistics.median(c.seconds)
        quartiles = statistics.quantiles(c.seconds, n=4) if len(c.seconds) > 1 else [median] * 3
        rows[c.name] = {
            "ms_per_step": median * 1e3,
            "spread_ms": (quartiles[2] - quartiles[0]) / 2 * 1e3,
            "fastest_ms": min(c.seconds) * 1e3,
            "cpu_ms": statistics.median(c.cpu) * 1e3,
            "tokens_per_second": tokens / median,
            "mfu": c.info[0]["flops_per_token"] * tokens / median / peak,
            "resident_mib": c.memory["resident"],
            "allocated_mib": c.memory["allocated"],
            "flops_per_token": c.info[0]["flops_per_token"],
            "parameters": c.info[0]["parameters"],
            "last_loss": c.losses[-1],
        }
    return {
        "case": str(case),
        "shape": case.shape,
        "precision": case.precision,
        "processes": case.processes,
        "tokens_per_step": tokens,
        "matmul_gflops": peak / 1e9,
        "contenders": rows,
        "ratios": ratios({c.name: c.seconds for c in contenders}, rows),
        "cpu_ratios": ratios({c.name: c.cpu for c in contenders}, {}),
    }


def ratios(seconds: dict[str, list[float]], rows: dict[str, dict]) -> dict[str, float]:
    """Medians of the rounds' own ratios: what slows the machine down for a round slows all in it."""

    def over(a: str, b: str) -> float | None:
        if a not in seconds or b not in seconds:
            return None
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    found = {
        "step time, pi on / pi off": over(OURS_ON, OURS_OFF),
        "tokens/s, pi off / transformers": over(LLAMA, OURS_OFF),
        "tokens/s, pi off / stock": over(STOCK, OURS_OFF),
    }
    for kind in ("resident", "allocated") if {OURS_ON, OURS_OFF} <= rows.keys() else ():
        on, off = (rows[name][f"{kind}_mib"] for name in (OURS_ON, OURS_OFF))
        found[f"{kind} memory, pi on / pi off"] = on / off if off else None
    return {name: value for name, value in found.items() if value is not None}


def table(result: dict) -> str:
    """A case as text."""
    tokens, rate = result["tokens_per_step"], result["matmul_gflops"]
    lines = [f"{result['case']}: {tokens} tokens a step, matmul {rate:.0f} GFLOP/s"]
    lines.append(
        f"  {'contender':20} {'ms/step':>9} {'spread':>7} {'CPU ms':>9} {'tokens/s':>9} {'MFU':>5} "
        f"{'resident':>9} {'allocated':>9}"
    )
    for name, row in result["contenders"].items():
        lines.append(
            f"  {name:20} {row['ms_per_step']:9.1f} {row['spread_ms']:7.1f} {row['cpu_ms']:9.1f} "
            f"{row['tokens_per_second']:9.0f} {row['mfu']:5.2f} "
            f"{row['resident_mib']:9.0f} {row['allocated_mib']:9.0f}"
        )
    for name, value in result["ratios"].items():
        cpu = result["cpu_ratios"].get(name)
        lines.append(f"  {name}: {value:.3f}" + ("" if cpu is None else f" (CPU time {cpu:.3f})"))
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """Share of the matmul rate that each contender reaches, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2.5 + 1.8 * len(results), 4), layout="constrained")
    names = list(CONTENDERS)
    for i, name in enumerate(names):
        places = [j + 0.2 * (i - 1.5) for j, r in enumerate(results) if name in r["contenders"]]
        heights = [r["contenders"][name]["mfu"] for r in results if name in r["contenders"]]
        bars = axes.bar(places, heights, 0.18, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(results)), [r["case"].replace(", ", "\n") for r in results])
    axes.set_ylabel("share of the measured matmul rate (MFU)")
    figure.legend(fontsize=8, ncols=2, loc="outside upper center")
    figure.savefig(path, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["small"])
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--processes", nargs="+", type=int, choices=[1, 2], default=[1])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=1, help="gradients are summed over so many")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-seconds", type=float, default=0.5, help="a turn takes at least so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a contender in all")
    parser.add_argument("--output", type=Path, help="folder for table.txt, results.json and mfu.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every case asked for."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    results = []
    for shape in args.shapes:
        for precision in args.precisions:
            for processes in args.processes:
                results.append(measure(Case(shape, precision, processes), args))
                if not args.json:
                    print(table(results[-1]), flush=True)
    if args.json:
        print(json.dumps({"threads": args.threads, "torch": torch.__version__, "results": results}))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.txt").write_text("\n".join(map(table, results)) + "\n")
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, args.output / "mfu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

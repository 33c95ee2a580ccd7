"""Muon beside AdamW: each at several learning rates with several seeds, then Muon with fewer tokens.

    python benchmarks/optimizers.py --train train.jsonl.gz --validation valid.jsonl.gz --work runs/muon

Every run is a whole one: its learning rate decays to a tenth by its last step. Says how many of AdamW's
tokens Muon needs to end at the same bits per byte, by a line through its ends at fewer tokens. Writes
results.json, results.md and curves.png. What is there already is not made again: a command that was cut
off goes on.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # a checkout works without being installed

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.study import Run, Study, bits_per_byte, spread, validation
from megatron_ext.common.files import write_picture

BATCH, SEQUENCE = 16, 256
MUON = {"optimizer": "muon", "muon-momentum": 0.95, "muon-use-nesterov": True, "muon-extra-scale-factor": 0.2}
OPTIMIZERS = {"adamw": {"optimizer": "adam"}, "muon": MUON}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--train", type=Path, nargs="+", required=True, metavar="FILE", help="JSON Lines to train on"
    )
    p.add_argument(
        "--validation", type=Path, nargs="+", required=True, metavar="FILE", help="held-out JSON Lines"
    )
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="where everything goes")
    p.add_argument("--preset", default="tiny", metavar="NAME", help="the model (default tiny)")
    p.add_argument("--iters", type=int, default=400, metavar="N", help="steps of 4,096 tokens (default 400)")
    p.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3],
        metavar="X",
        help="rates to try",
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    p.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.625, 0.75], metavar="X",
        help="of the steps, for Muon at its best rate",
    )  # fmt: skip
    p.add_argument("--processes", type=int, default=2, metavar="N", help="runs at a time (default 2)")
    return p


def main() -> None:
    """Train what is missing, then put the results together."""
    args = parser().parse_args()
    study = Study(args.work, args.train, args.validation, 4096, args.processes)
    swept = [
        training(args, optimizer, lr, seed)
        for seed in args.seeds
        for lr in args.lr
        for optimizer in OPTIMIZERS
    ]
    records = study.finish(swept)
    ends = {name: bits_per_byte(of_run) for name, of_run in records.items()}
    best = {optimizer: best_rate(args, optimizer, ends) for optimizer in OPTIMIZERS}
    shorter = [
        training(args, "muon", best["muon"], seed, share) for share in args.shares for seed in args.seeds
    ]
    records |= study.finish(shorter)
    ends = {name: bits_per_byte(of_run) for name, of_run in records.items()}
    report = rates(args, ends) + "\n" + tokens_needed(args, ends, best)
    (study.work / "results.json").write_text(
        json.dumps({"best": best, "bits_per_byte": ends}, indent=1) + "\n"
    )
    (study.work / "results.md").write_text(report)
    draw(args, records, best, study.work / "curves.png")
    print(report)


def training(args: argparse.Namespace, optimizer: str, lr: float, seed: int, share: float = 1.0) -> Run:
    """One run of ``share`` of the steps."""
    iterations = round(args.iters * share)
    flags = {
        "model-preset": args.preset,
        "micro-batch-size": BATCH,
        "global-batch-size": BATCH,
        "train-iters": iterations,
        "lr": lr,
        "min-lr": lr / 10,
        "lr-warmup-fraction": 0.05,
        "eval-interval": max(1, iterations // 4),
        "seed": seed,
    }
    return Run(name_of(optimizer, lr, seed, share), flags | OPTIMIZERS[optimizer])


def name_of(optimizer: str, lr: float, seed: int, share: float = 1.0) -> str:
    """The folder of a run."""
    return f"{optimizer}_lr{lr:g}_seed{seed}" + (f"_{share:g}" if share != 1.0 else "")


def of_seeds(
    args: argparse.Namespace, ends: dict[str, float], *which: object, share: float = 1.0
) -> list[float]:
    """Bits per byte of an optimizer at a rate, by seed."""
    optimizer, lr = which
    return [ends[name_of(str(optimizer), lr, seed, share)] for seed in args.seeds]  # type: ignore[arg-type]


def best_rate(args: argparse.Namespace, optimizer: str, ends: dict[str, float]) -> float:
    """The rate with the lowest mean over the seeds."""
    return min(args.lr, key=lambda lr: statistics.mean(of_seeds(args, ends, optimizer, lr)))


def rates(args: argparse.Namespace, ends: dict[str, float]) -> str:
    """Markdown: bits per byte at each learning rate."""
    lines = [f"| learning rate | {' | '.join(OPTIMIZERS)} |", "|---" * (1 + len(OPTIMIZERS)) + "|"]
    for lr in args.lr:
        cells = [spread(of_seeds(args, ends, optimizer, lr)) for optimizer in OPTIMIZERS]
        lines.append(f"| {lr:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tokens_needed(args: argparse.Namespace, ends: dict[str, float], best: dict[str, float]) -> str:
    """Markdown: Muon with fewer tokens beside AdamW with all, and the share at which they meet, by seed."""
    adamw = of_seeds(args, ends, "adamw", best["adamw"])
    lines = ["| tokens | muon | less adamw's with all tokens |", "|---|---|---|"]
    curves = []
    for share in (*args.shares, 1.0):
        muon = of_seeds(args, ends, "muon", best["muon"], share=share)
        curves.append(muon)
        less = [mine - theirs for mine, theirs in zip(muon, adamw, strict=True)]
        tokens = round(args.iters * share) * BATCH * SEQUENCE / 1e6
        lines.append(f"| {tokens:.2f} M ({share:g}) | {spread(muon)} | {spread(less, '+')} |")
    needed = [
        share_needed((*args.shares, 1.0), curve, end)
        for curve, end in zip(zip(*curves, strict=True), adamw, strict=True)
    ]
    said = ", ".join("more than all" if share is None else f"{share:.2f}" for share in needed)
    return "\n".join(lines) + f"\n\nShare of AdamW's tokens that Muon needs, by seed: {said}.\n"


def share_needed(shares: Iterable[float], ends: Sequence[float], goal: float) -> float | None:
    """Where the line through (log share, end) falls to ``goal``; the first share if it starts below."""
    points = list(zip(shares, ends, strict=True))
    if points[0][1] <= goal:
        return points[0][0]
    for (left, above), (right, below) in zip(points, points[1:], strict=False):
        if below <= goal:
            part = (above - goal) / (above - below)
            return math.exp(math.log(left) + part * (math.log(right) - math.log(left)))
    return None


def draw(
    args: argparse.Namespace, records: dict[str, list[dict]], best: dict[str, float], path: Path
) -> None:
    """Left the ends over the rates, right the validation curves at the best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for optimizer in OPTIMIZERS:
        ends = {name: bits_per_byte(of_run) for name, of_run in records.items()}
        values = [of_seeds(args, ends, optimizer, lr) for lr in args.lr]
        (line,) = left.plot(args.lr, [*map(statistics.mean, values)], marker="o", label=optimizer)
        for seed in args.seeds:
            curve = validation(records[name_of(optimizer, best[optimizer], seed)])
            x = [record["iteration"] * BATCH * SEQUENCE / 1e6 for record in curve]
            right.plot(x, [record["bits_per_byte"] for record in curve], marker=".", color=line.get_color())
    left.set(xscale="log", xlabel="learning rate", ylabel="bits per byte of held-out text at the end")
    left.legend()
    right.set(xlabel="million tokens", ylabel="bits per byte of held-out text")
    write_picture(figure, path)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Draw the loss curves of one or several runs from their --metrics-file.

    python tools/plot_metrics.py runs/quickstart/metrics.jsonl --output loss.png
    python tools/plot_metrics.py a.jsonl b.jsonl --x consumed_tokens --output compare.png

Thin lines are training losses, thick ones their running mean, points validation losses. --terminal draws the
running means in the terminal as well.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.common.files import refuse_overwriting, write_picture

Records = list[dict[str, Any]]
#: What a record of each kind says in numbers.
TRAINING = ("iteration", "lm_loss", "consumed_samples", "consumed_tokens", "tokens_per_second")
VALIDATION = ("iteration", "lm_loss", "bits_per_byte")


class MetricsError(ValueError):
    """A metrics file that cannot be used."""


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = make_parser().parse_args(argv)
    refuse_overwriting([args.output], args.metrics)
    runs = {str(path): read_run(path) for path in args.metrics}
    try:
        draw(runs, args.x, args.output)
    except ImportError:
        raise ValueError("drawing needs: pip install matplotlib") from None
    summaries = {name: summary(*run) for name, run in runs.items()}
    if args.json:
        print(json.dumps({"output": str(args.output), "runs": summaries}))
    else:
        if args.terminal:
            print(in_terminal(runs, args.x))
        print(f"wrote {args.output}")
        for name, values in summaries.items():
            print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in values.items()))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser(__doc__)
    parser.add_argument("metrics", nargs="+", type=Path, help="files written by --metrics-file")
    parser.add_argument("--output", type=Path, required=True, help="the PNG (or .svg, .pdf) to write")
    parser.add_argument(
        "--x", choices=["iteration", "consumed_samples", "consumed_tokens"], default="iteration"
    )
    parser.add_argument("--terminal", action="store_true", help="draw the curves in the terminal too")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return parser


def read_run(path: Path) -> tuple[Records, Records]:
    """Training and validation records in order; of an iteration that was run again, the last.

    Raises:
        MetricsError: a line is not a record of --metrics-file, or there is no training record.
    """
    training: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if record.get("split") == "tasks":  # scores of --eval-tasks, which are no losses
                    continue
                kind, wanted = (validation, VALIDATION) if record.get("split") else (training, TRAINING)
                if type(record["iteration"]) is not int or not all(_is_number(record[n]) for n in wanted):
                    raise ValueError
            except (ValueError, KeyError, AttributeError, RecursionError):
                if not line.endswith(b"\n"):  # the run that writes it has not finished this line
                    break
                raise MetricsError(f"{path}, line {number}: not a record of --metrics-file") from None
            if record.get("split") in (None, "validation"):
                kind[record["iteration"]] = record
    if not training:
        raise MetricsError(f"{path}: holds no training iteration")
    return [training[i] for i in sorted(training)], [validation[i] for i in sorted(validation)]


def _is_number(value: object) -> bool:
    """A number that can be drawn, or null: JSON has no word for NaN."""
    return value is None or (type(value) is int and abs(value) < 2**63) or type(value) is float


def summary(training: Records, validation: Records) -> dict[str, float]:
    """The numbers that the picture shows: losses at the start and the end, and the speed."""
    values = {
        "iterations": training[-1]["iteration"],
        "first_loss": training[0]["lm_loss"],
        "last_loss": training[-1]["lm_loss"],
        "consumed_tokens": training[-1]["consumed_tokens"],
        "tokens_per_second": sorted(r["tokens_per_second"] for r in training)[len(training) // 2],
    }
    if validation:
        values |= {
            "first_validation_loss": validation[0]["lm_loss"],
            "last_validation_loss": validation[-1]["lm_loss"],
            "last_bits_per_byte": validation[-1]["bits_per_byte"],
        }
    return {name: value for name, value in values.items() if value is not None}


def draw(runs: dict[str, tuple[Records, Records]], x: str, output: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = short_names(list(runs))
    for name, (training, validation), color in zip(names, runs.values(), _colors(len(runs)), strict=True):
        label = f"{name}: " if len(runs) > 1 else ""
        xs, losses = [record[x] for record in training], losses_of(training)
        axes.plot(xs, losses, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(xs, running_mean(losses), color=color, linewidth=1.8, label=f"{label}training")
        at = {record["iteration"]: record[x] for record in training}
        points = [(at[r["iteration"]], r["lm_loss"]) for r in validation if r["iteration"] in at]
        if points:
            said = f"{label}validation" if len(runs) < 4 else None  # the legend would cover the curves
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=5, label=said)
    axes.set(xlabel=x.replace("_", " "), ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_picture(figure, output)
    pyplot.close(figure)


def in_terminal(runs: dict[str, tuple[Records, Records]], x: str) -> str:
    """The running means of the training losses, drawn with characters."""
    try:
        from uniplot import plot_to_string
    except ImportError:
        raise ValueError("--terminal needs: pip install uniplot") from None
    names = short_names(list(runs))
    return plot_to_string(
        [running_mean(losses_of(training)) for training, _ in runs.values()],
        [[record[x] for record in training] for training, _ in runs.values()],
        lines=True,
        width=70,
        height=12,
        color=len(runs) > 1 and sys.stdout.isatty(),
        legend_labels=names if len(runs) > 1 else None,
        title=f"loss (nats per token) over {x.replace('_', ' ')}",
    )


def losses_of(training: Records) -> list[float]:
    """NaN where there is none."""
    return [math.nan if record["lm_loss"] is None else record["lm_loss"] for record in training]


def short_names(paths: list[str]) -> list[str]:
    """What tells files apart: without the folder they share, and without the suffix."""
    if len(paths) == 1:
        return [Path(paths[0]).stem]
    whole = [Path(path).absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    return [str(path.relative_to(shared).with_suffix("")) for path in whole]


def running_mean(values: list[float], half_width: int = 12) -> list[float]:
    """Mean over each point's neighbours, as many on either side; NaN values are passed over.

    Near the ends the window narrows: a mean of one side alone would lag behind a falling loss.
    """
    means = []
    for i in range(len(values)):
        reach = min(half_width, i, len(values) - 1 - i)
        near = [value for value in values[i - reach : i + reach + 1] if not math.isnan(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _colors(count: int) -> list[str]:
    return [f"C{index % 10}" for index in range(count)]


if __name__ == "__main__":
    sys.exit(main())

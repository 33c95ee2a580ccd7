"""How far each task's numbers move over a run, against their error: a table, and a picture.

    python benchmarks/task_signal.py metrics.jsonl --output docs/evaluation.png

Reads what --eval-tasks left in the --metrics-file of a run. The signal is the change from the first scoring
to the last; the noise is the bootstrap error of such a difference (evaluation/statistics.py).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common.files import write_picture  # noqa: E402
from megatron_ext.evaluation.documents import BENCHMARKS  # noqa: E402
from megatron_ext.evaluation.statistics import signal_to_noise  # noqa: E402

NUMBERS = {"acc_bytes": "cloze accuracy", "bits_per_byte": "bits per byte of the right answer"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = map(json.loads, options.metrics.read_text().splitlines())
    found = {record["iteration"]: record for record in lines if record.get("split") == "tasks"}
    records = [found[iteration] for iteration in sorted(found)]
    print("| task | number | first | last | error | signal / noise |\n|---|---|---|---|---|---|")
    for name, benchmark in BENCHMARKS.items():
        for number, words in NUMBERS.items():
            key = f"{name}_cloze/{number}"
            if key not in records[0]:
                continue
            means, error = [record[key] for record in records], records[-1][f"{key}_error"]
            print(
                f"| {benchmark.title} | {words} | {means[0]:.3f} | {means[-1]:.3f} | {error:.3f} | "
                f"{signal_to_noise(means, error):.1f} |"
            )
    if options.output:
        draw(records, options.output)


def draw(records: list[dict], output: Path) -> None:
    """Both numbers of each task over the iterations, with their errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    iterations = [record["iteration"] for record in records]
    for axes, (number, words) in zip(panels, reversed(NUMBERS.items()), strict=True):
        for name, benchmark in BENCHMARKS.items():
            key = f"{name}_cloze/{number}"
            if key in records[0]:
                values, errors = ([record[k] for record in records] for k in (key, f"{key}_error"))
                axes.errorbar(iterations, values, errors, capsize=2, label=benchmark.title)
        axes.set(xlabel="iteration", ylabel=words)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    write_picture(figure, output)


if __name__ == "__main__":
    main()

"""Results in Markdown, beside the paper's, and as a picture."""

import math
from pathlib import Path
from typing import Any

from megatron_ext.common.files import write_picture
from megatron_ext.evaluation.documents import BENCHMARKS
from megatron_ext.evaluation.forms import FORMS, Form, task_name

#: Table of results of PanGu-pi Pro, arXiv 2402.02791; the average is over all ten.
PAPER_COLUMNS = (
    "C-Eval",
    "CMMLU",
    "MMLU",
    "AGI-Eval",
    "BoolQ",
    "AX-b",
    "PIQA",
    "EPRSTMT",
    "XSum",
    "C3",
    "Avg",
)
PAPER = {
    "PanGu-π-1B": (36.85, 35.90, 35.96, 30.77, 58.44, 43.48, 61.92, 55.62, 15.92, 49.21, 42.41),
    "PanGu-π-1B Pro": (46.50, 46.56, 50.38, 41.58, 63.43, 53.99, 64.96, 74.38, 18.40, 52.66, 51.28),
    "PanGu-π-1.5B Pro": (52.91, 49.51, 53.76, 44.42, 63.73, 55.93, 73.94, 89.38, 22.23, 59.56, 56.49),
    "Qwen-1.8B": (53.60, 52.12, 46.43, 35.83, 64.31, 57.79, 73.83, 88.12, 20.03, 58.30, 55.04),
    "Phi2-2.7B": (31.86, 32.18, 58.49, 28.51, 77.40, 43.57, 78.89, 46.25, 13.66, 40.11, 45.09),
}
#: The harness's tasks of the paper's other columns, and their number.
_OTHERS = {"ceval-valid": ("C-Eval", "acc"), "boolq": ("BoolQ", "acc"), "xsum": ("XSum", "rouge1")}
_ACCURACY: dict[Form, str] = {"letters": "acc", "cloze": "acc_bytes"}


def table(found: dict[str, Any]) -> str:
    """The paper's table with this model's rows, then every number with its error."""
    parts = [f"# {found['model']}", f"{found['parameters']:,} parameters."]
    if found["tasks"]:
        parts += [*_paper_table(found), _task_table(found)]
    if found["texts"]:
        parts.append(_text_table(found["texts"]))
    return "\n\n".join(parts) + "\n"


_NOTE = (
    "Accuracy in percent. The other models' rows are the paper's (arXiv 2402.02791, table of results); its "
    "prompts and examples are not published, so rows compare in size, not to the last digit. ± is the "
    "bootstrap error over items."
)


def _paper_table(found: dict[str, Any]) -> list[str]:
    """Nothing where no accuracy of the paper's was scored."""
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in PAPER.items()]
    own = [[f"this model, {form}", *_own_row(found["tasks"], form)] for form in _ACCURACY]
    own = [row for row in own if set(row[1:]) != {"-"}]
    return [_markdown(["model", *PAPER_COLUMNS], rows + own), _NOTE] if own else []


def _own_row(tasks: dict[str, Any], form: Form) -> list[str]:
    values: dict[str, float] = {}
    for name, benchmark in BENCHMARKS.items():
        task = tasks.get(task_name(name, form))
        if task:
            values[benchmark.title] = 100 * task["metrics"][_ACCURACY[form]]["value"]
    if form == "letters":
        for name, (column, metric) in _OTHERS.items():
            if name in tasks and metric in tasks[name]["metrics"]:
                values[column] = 100 * tasks[name]["metrics"][metric]["value"]
    if len(values) == len(PAPER_COLUMNS) - 1:
        values["Avg"] = sum(values.values()) / len(values)
    return [f"{values[column]:.2f}" if column in values else "-" for column in PAPER_COLUMNS]


def _task_table(found: dict[str, Any]) -> str:
    rows = []
    for name, task in found["tasks"].items():
        for metric, number in task["metrics"].items():
            chance = (
                f"{task['chance']:.4f}" if metric.startswith("acc") and not _missing(task["chance"]) else ""
            )
            error = "" if _missing(number["error"]) else f" ± {number['error']:.4f}"
            value = "-" if _missing(number["value"]) else f"{number['value']:.4f}"
            rows.append(
                [
                    name,
                    metric,
                    f"{value}{error}",
                    chance,
                    f"{task['items']:,}",
                    f"{task['truncated']:,}",
                ]
            )
    return _markdown(["task", "number", "value", "chance", "items", "truncated"], rows)


def _text_table(texts: dict[str, Any]) -> str:
    rows = []
    for path, text in texts.items():
        sources = {f"{Path(path).name}": text} | {
            f"&nbsp;&nbsp;{source}": t for source, t in text["sources"].items()
        }
        rows += [
            [name, f"{one['bits_per_byte']:.4f}", f"{one['documents']:,}", f"{one['bytes']:,}"]
            for name, one in sources.items()
        ]
    return _markdown(["text", "bits per byte", "documents", "bytes"], rows)


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: dict[str, Any], output: Path) -> None:
    """Accuracies against chance and the paper's models, and bits per byte of the right answers.

    Nothing is drawn without matplotlib, or if no benchmark of the paper's was scored.
    """
    names = [name for name in BENCHMARKS if any(task_name(name, form) in found["tasks"] for form in FORMS)]
    try:
        import matplotlib
    except ImportError:
        return
    if not names:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = [BENCHMARKS[name].title for name in names]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    for shift, (form, metric) in zip((-0.2, 0.2), _ACCURACY.items(), strict=True):
        tasks = [found["tasks"].get(task_name(name, form)) for name in names]
        _bars(left, tasks, metric, shift, scale=100, label=form)
    for model, marker in zip(("PanGu-π-1B", "PanGu-π-1B Pro"), "ox", strict=True):
        values = [PAPER[model][PAPER_COLUMNS.index(title)] for title in titles]
        left.plot(range(len(names)), values, marker, color="black", markersize=5, label=f"{model} (paper)")
    right_answers = [
        found["tasks"].get(task_name(name, "cloze")) or found["tasks"].get(task_name(name, "bpb"))
        for name in names
    ]
    _bars(right, right_answers, "bits_per_byte", 0.0)
    left.set(ylabel="accuracy, %", ylim=(0, None), title=found["model"])
    right.set(ylabel="bits per byte of the right answer")
    for axes in (left, right):
        axes.set_xticks(range(len(names)), titles)
        axes.grid(alpha=0.3, axis="y")
    left.legend(fontsize=8)
    write_picture(figure, output)
    pyplot.close(figure)


def _bars(
    axes: Any,
    tasks: list[dict[str, Any] | None],
    metric: str,
    shift: float,
    scale: float = 1,
    label: str | None = None,
) -> None:
    """A bar with its error for each task that was scored, and a line at chance under an accuracy."""
    there = [(place + shift, task) for place, task in enumerate(tasks) if task is not None]
    if not there:
        return
    numbers = [task["metrics"][metric] for _, task in there]
    places = [place for place, _ in there]
    heights, errors = (
        [scale * (math.nan if number[key] is None else number[key]) for number in numbers]
        for key in ("value", "error")
    )
    axes.bar(places, heights, 0.36, yerr=errors, label=label)
    if metric.startswith("acc"):
        chances = [scale * task["chance"] for _, task in there]
        left, right = ([place + side for place in places] for side in (-0.18, 0.18))
        axes.hlines(chances, left, right, color="gray", linestyle=":")

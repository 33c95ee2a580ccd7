"""Two results item by item: which tasks differ beyond chance."""

import json
from typing import Any

from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.evaluation.statistics import holm, paired_difference
from megatron_ext.harness import results


def compare(one: str, other: str) -> dict[str, Any]:
    """The paired bootstrap of B - A for each number of each task that both folders have.

    The verdict of a number takes all of them into account (Holm's correction at 5 %).

    Raises:
        EvaluationError: they share no task, or asked its items differently.
    """
    a, b = results.read(one), results.read(other)
    shared = [name for name in a["tasks"] if name in b["tasks"]]
    if not shared:
        raise EvaluationError(f"--compare {one} {other}: they have no task in common")
    rows = [row for name in shared for row in _of_task(name, a["tasks"][name], b["tasks"][name])]
    for row, differs in zip(rows, holm([row["p"] for row in rows]), strict=True):
        better = "B" if (row["difference"] > 0) == row["higher_is_better"] else "A"
        row["verdict"] = f"{better} is better" if differs else "no difference beyond chance"
    return {"a": a["model"], "b": b["model"], "tasks": rows}


def _of_task(name: str, a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    ours, theirs = ({item["index"]: item for item in task["samples"]} for task in (a, b))
    both = [index for index in ours if index in theirs]
    if any(_question(ours[index]) != _question(theirs[index]) for index in both):
        raise EvaluationError(
            f"--compare: {name} was asked differently in A and B (--num-fewshot, --data-dir): nothing to pair"
        )
    rows = []
    for metric, number in a["metrics"].items():
        pairs = [(ours[index].get(metric), theirs[index].get(metric)) for index in both]
        if not pairs or any(not isinstance(value, (int, float)) for pair in pairs for value in pair):
            continue  # no mean over items
        found = paired_difference(*zip(*pairs, strict=True))
        rows.append(
            {
                "task": name,
                "number": metric,
                "higher_is_better": number["higher_is_better"],
                "items": found.items,
            }
            | {
                "a": sum(pair[0] for pair in pairs) / len(pairs),
                "b": sum(pair[1] for pair in pairs) / len(pairs),
            }
            | {"difference": found.mean, "low": found.low, "high": found.high, "p": found.p}
        )
    return rows


def _question(item: dict[str, Any]) -> tuple[Any, ...]:
    """What was asked, and what is right."""
    return tuple(item.get(name) for name in ("prompt_hash", "choices", "gold"))


def told(found: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"A: {found['a']}\nB: {found['b']}\n",
        "| task | number | items | A | B | B - A (95 %) | p | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['task']} | {row['number']} | {row['items']:,} | {row['a']:.4f} | {row['b']:.4f} | "
        f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) | {row['p']:.4f} | "
        f"{row['verdict']} |"
        for row in found["tasks"]
    ]
    return "\n".join(lines)


def as_json(found: dict[str, Any]) -> str:
    """The comparison as one JSON object."""
    return json.dumps(found, ensure_ascii=False)

"""What an evaluation found: its record, its files, and the means and errors in it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.common.files import write_aside, write_json
from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.evaluation.statistics import bootstrap_error, mean
from megatron_ext.harness import report
from megatron_ext.harness.options import EvaluateOptions

if TYPE_CHECKING:
    from megatron_ext.harness.load import Opened

FORMAT = "megatron_ext.evaluation/1"
_SAMPLES = "samples"


def new(model: "Opened", options: EvaluateOptions) -> dict[str, Any]:
    """A record without results."""
    return {
        "format": FORMAT,
        "model": model.name,
        "identity": model.identity,
        "parameters": model.run.model.without_padding.num_parameters,
        "tokenizer_sha256": model.tokenizer.sha256,
        "options": {name: value for name, value in asdict(options).items() if value is not None},
        "tasks": {},
        "texts": {},
    }


def of_task(name: str, found: dict[str, Any], truncated: int) -> dict[str, Any]:
    """One task's means with the bootstrap errors of their items, and the items themselves.

    A number that is no mean over items (such as a corpus's F1) is the harness's, with no error.
    """
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    better = found["higher_is_better"][name]
    metrics = {}
    for metric in better:
        values = [sample.get(metric) for sample in samples]
        if all(isinstance(value, (int, float)) for value in values):
            metrics[metric] = {"value": mean(values), "error": bootstrap_error(values)}
        else:
            metrics[metric] = {"value": _aggregated(found["results"][name], metric), "error": math.nan}
        metrics[metric]["higher_is_better"] = better[metric]
    items = [_item(sample, list(better)) for sample in samples]
    chances = [1 / len(item["choices"]) for item in items if item.get("choices")]
    return {
        "items": len(items),
        "num_fewshot": found["n-shot"][name],
        "truncated": truncated,
        "chance": mean(chances) if chances else math.nan,
        "metrics": metrics,
        _SAMPLES: items,
    }


def _aggregated(values: dict[str, Any], metric: str) -> float:
    return next((value for key, value in values.items() if key.split(",")[0] == metric), math.nan)


def _item(sample: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """What is kept of an item: enough to compare it, and to see what the model was asked."""
    document = sample["doc"]
    kept = {name: document[name] for name in ("id", "subject", "gold") if name in document}
    arguments = [list(argument) for argument in sample["arguments"]]
    return (
        {"index": sample["doc_id"]}
        | kept
        | {"context": arguments[0][0], "choices": [argument[-1] for argument in arguments]}
        | {"answers": sample["filtered_resps"], "prompt_hash": sample["prompt_hash"]}
        | {metric: sample[metric] for metric in metrics if metric in sample}
    )


def write(found: dict[str, Any], folder: Path) -> None:
    """Put the files in place: those of the items, the table, the picture, and results.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in found["tasks"].items():
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in task[_SAMPLES])
        write_aside(folder / f"items_{name}.jsonl", "".join(lines).encode())
    write_aside(folder / "table.md", report.table(found).encode())
    if found["tasks"]:
        report.draw(found, folder / "scores.png")
    write_json(folder / "results.json", summary(found))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The record without the items; JSON has no NaN."""
    tasks = {
        name: {key: value for key, value in task.items() if key != _SAMPLES}
        for name, task in found["tasks"].items()
    }
    return _without_nan(found | {"tasks": tasks})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: str | Path) -> dict[str, Any]:
    """The record in a folder of --output, with its items.

    Raises:
        EvaluationError: there is none, or a file is damaged.
    """
    folder = Path(folder)
    found = _read(folder / "results.json", json.loads)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise EvaluationError(f"{folder / 'results.json'}: no results of tools/evaluate.py")
    for name, task in found["tasks"].items():
        path = folder / f"items_{Path(name).name}.jsonl"
        task[_SAMPLES] = _read(path, _items)
    return found


def _items(text: str) -> list[dict[str, Any]]:
    """One item a line; a text may hold what Python's splitlines takes for line ends."""
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}; --compare takes two folders of --output") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: damaged ({error})") from error

"""What an evaluation found: its record, its files, and the means and errors in it.

A folder of results belongs to one model that is computed with in one way: settings.json says which, before
anything is scored. results.json is written last and names the content of the items' files, so a kill between
them is seen.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.common.files import sha256, write_aside, write_json
from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.evaluation.statistics import bootstrap_error, mean
from megatron_ext.harness import report

if TYPE_CHECKING:
    from megatron_ext.harness.load import Opened

FORMAT = "megatron_ext.evaluation/2"
SCORES = "scores.jsonl"
_SETTINGS, _RESULTS = "settings.json", "results.json"
_SAMPLES = "samples"
#: Of a digest, in messages.
_SHOWN = 12


def new(model: "Opened") -> dict[str, Any]:
    """A record without results."""
    return {
        "format": FORMAT,
        "model": model.name,
        "parameters": model.run.model.without_padding.num_parameters,
        "settings": model.settings,
        "tasks": {},
        "texts": {},
    }


def refuse_other_content(folder: Path) -> None:
    """Raise EvaluationError where ``--output`` is no new folder and no folder of results."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise EvaluationError(f"--output {folder}: is a file; give a folder")
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if _SETTINGS not in there and (others := [name for name in there if name != SCORES]):
        raise EvaluationError(
            f"--output {folder}: holds other files ({', '.join(others[:3])}{', ...' * (len(others) > 3)}); "
            "give a new folder"
        )


def refuse_other_questions(folder: Path, asked: dict[str, dict[str, Any]]) -> None:
    """Raise EvaluationError where ``--output`` has a task that was asked otherwise than ``asked[name]``."""
    there = _earlier(folder)["tasks"]
    for name in asked.keys() & there.keys():
        if differences := _differences(there[name]["asked"], asked[name]):
            raise EvaluationError(
                f"--output {folder}: has {name} asked otherwise ({differences}); give another folder"
            )


def claim(folder: Path, found: dict[str, Any]) -> None:
    """Say in the folder whose results it holds.

    Raises:
        EvaluationError: it holds those of another model, or of one that was computed with in another way.
    """
    said = {name: found[name] for name in ("format", "model", "settings")}
    path = folder / _SETTINGS
    if not path.exists():
        write_json(path, said)
        return
    there = _record(path)
    if differences := _differences(there["settings"], said["settings"]):
        raise EvaluationError(
            f"--output {folder}: holds the scores of {there['model']} with other settings ({differences}); "
            "give another folder"
        )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {str(there.get(name))[:_SHOWN]} there, {str(here.get(name))[:_SHOWN]} here"
        for name in (*here, *(name for name in there if name not in here))
        if there.get(name) != here.get(name)
    )


def of_task(name: str, found: dict[str, Any], truncated: int, asked: dict[str, Any]) -> dict[str, Any]:
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
        "asked": asked,
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
    """Put the files in place: those of the items, the table, the picture, and results.json last.

    Tasks and texts that the folder has of earlier runs stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier, added = _earlier(folder), summary(found)
    for name, task in found["tasks"].items():
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in task[_SAMPLES])
        content = "".join(lines).encode()
        write_aside(_items_path(folder, name), content)
        added["tasks"][name]["items_sha256"] = sha256(content)
    whole = added | {part: earlier[part] | added[part] for part in ("tasks", "texts")}
    write_aside(folder / "table.md", report.table(whole).encode())
    if whole["tasks"]:
        report.draw(whole, folder / "scores.png")
    write_json(folder / _RESULTS, whole)


def _items_path(folder: Path, task: str) -> Path:
    return folder / f"items_{Path(task).name}.jsonl"


def _earlier(folder: Path) -> dict[str, Any]:
    path = folder / _RESULTS
    return _record(path) if path.exists() else {"tasks": {}, "texts": {}}


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
    found = _record(folder / _RESULTS)
    for name, task in found["tasks"].items():
        task[_SAMPLES] = _read(_items_path(folder, name), partial(_items, task["items_sha256"]))
    return found


def _record(path: Path) -> dict[str, Any]:
    found = _read(path, json.loads)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise EvaluationError(f"{path}: no results of this version of tools/evaluate.py")
    return found


def _items(digest: str, content: bytes) -> list[dict[str, Any]]:
    """One item a line; a text may hold what Python's splitlines takes for line ends."""
    if sha256(content) != digest:
        raise ValueError("not the items of results.json; score them again")
    text = content.decode()
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise EvaluationError(
            f"{path}: {error.strerror}; the file is of a finished run of --output"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: damaged ({error})") from error

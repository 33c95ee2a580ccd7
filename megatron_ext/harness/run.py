"""tools/evaluate.py from flags to results."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ext import platform
from megatron_ext.common.progress import Progress
from megatron_ext.evaluation.documents import BENCHMARKS, EvaluationError
from megatron_ext.evaluation.forms import TASKS, task_name
from megatron_ext.evaluation.scoring import Scorer
from megatron_ext.harness import results
from megatron_ext.harness.cache import ScoreFile
from megatron_ext.harness.load import opened
from megatron_ext.harness.options import EvaluateOptions
from megatron_ext.harness.text import measure
from megatron_ext.platform.collective import on_first_rank, rank

#: The forms that a benchmark's name alone stands for: the cloze form has the bits per byte too.
_USUAL_FORMS = ("letters", "cloze")
_SEED = 1234


def evaluate(options: EvaluateOptions, quiet: bool = False) -> dict[str, Any]:
    """Score a model on tasks and texts, write ``--output``; the results, on every rank.

    What can be wrong with tasks and data is found before the model is opened.

    Raises:
        EvaluationError: an unknown task, missing or damaged data, a model without tokenizer.
    """
    platform.activate(options.device)
    tasks = loaded_tasks(options) if options.tasks else {}
    with opened(options) as model, _kept(options) as kept:
        longest = model.run.model.max_position_embeddings
        with Progress("scoring", None, " requests", quiet=quiet or rank() > 0) as progress:
            scorer = Scorer(
                [model.model],
                longest,
                tokens_at_once=options.tokens_at_once,
                memory=kept,
                identity=model.identity,
                note=progress.add,
            )
            found = results.new(model, options)
            if tasks:
                from megatron_ext.harness.language_model import PanguLM

                found["tasks"] = _scored(tasks, PanguLM(model, scorer, kept, progress.expect), options)
            if options.bits_per_byte:
                found["texts"] = measure(options.bits_per_byte, model, scorer)
    _warn_of_truncation(found, longest)
    if options.output:
        on_first_rank(lambda: results.write(found, Path(options.output or "")))
    return found


@contextlib.contextmanager
def _kept(options: EvaluateOptions) -> Iterator[ScoreFile | None]:
    """What was scored before; the first rank has it."""
    if not options.output:
        yield None
        return
    path = Path(options.output) / "scores.jsonl"
    made: list[ScoreFile] = []
    on_first_rank(lambda: made.append(ScoreFile(path)))
    try:
        yield made[0] if made else None
    finally:
        for one in made:
            one.close()


def loaded_tasks(options: EvaluateOptions) -> dict[str, Any]:
    """The harness's tasks of ``--tasks``, by name, with their data.

    Raises:
        EvaluationError: there is no such task, or its data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval.tasks import TaskManager

        from megatron_ext.harness.tasks import FILES
    except ImportError as error:
        raise EvaluationError(f"--tasks needs: pip install lm_eval ({error})") from None
    names = task_names(options.tasks or [])
    foreign = [name for name in names if name not in TASKS]
    manager = TaskManager(
        include_path=str(FILES), include_defaults=bool(foreign), metadata={"data_dir": options.data_dir}
    )
    if unknown := [name for name in foreign if name not in manager.all_tasks]:
        raise EvaluationError(
            f"--tasks {' '.join(unknown)}: unknown; there are {', '.join(BENCHMARKS)}, each also with "
            "_letters, _cloze or _bpb, and the tasks of lm-evaluation-harness (lm_eval ls tasks)"
        )
    tasks: dict[str, Any] = {}
    for name in names:
        tasks |= _load(manager, name)
    for name, task in tasks.items():
        _set_examples(name, task, options.num_fewshot)
    return tasks


def task_names(asked: Sequence[str]) -> list[str]:
    """What the words of ``--tasks`` stand for, each once."""
    names = [
        name
        for word in asked
        for name in ([task_name(word, form) for form in _USUAL_FORMS] if word in BENCHMARKS else [word])  # type: ignore[arg-type]
    ]
    return list(dict.fromkeys(names))


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])["tasks"]
    except EvaluationError:
        raise
    except Exception as error:  # of whatever a task's own loader uses
        reason = (str(error).strip().splitlines() or [""])[0]
        raise EvaluationError(
            f"--tasks {name}: its data cannot be had ({type(error).__name__}: {reason}). lm-evaluation-"
            "harness downloads it from the Hugging Face Hub, or finds it in the cache that HF_HOME names"
        ) from error


def _set_examples(name: str, task: Any, asked: int | None) -> None:
    """``--num-fewshot``, where a task allows it; else its own number."""
    if asked is not None:
        if asked and name in TASKS and not BENCHMARKS[TASKS[name][0]].files["dev"]:
            raise EvaluationError(f"--num-fewshot {asked}: {name} has no questions to take examples from")
        if task.get_config("num_fewshot") != 0:  # such a task must be asked without
            task.set_config(key="num_fewshot", value=asked)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _scored(tasks: dict[str, Any], lm: Any, options: EvaluateOptions) -> dict[str, Any]:
    """The results of each task, on every rank; a collective call."""
    from lm_eval import evaluator

    # Errors of the means are ours, from each item: the harness would draw the same again for some metrics.
    found = evaluator.evaluate(lm, {"tasks": tasks}, limit=options.limit, bootstrap_iters=0)
    return {name: results.of_task(name, found, lm.truncated[name]) for name in tasks}


def _warn_of_truncation(found: dict[str, Any], longest: int) -> None:
    cut = {name: task["truncated"] for name, task in found["tasks"].items() if task["truncated"]}
    if cut and rank() == 0:
        told = ", ".join(f"{name} {count}" for name, count in cut.items())
        print(
            f"WARNING: longer than the model's {longest} positions, so read without the beginning: {told} "
            "requests",
            file=sys.stderr,
        )

"""tools/evaluate.py from flags to results."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext import platform
from megatron_ext.common.progress import Progress
from megatron_ext.evaluation.scoring import Scorer
from megatron_ext.harness import results
from megatron_ext.harness.cache import ScoreFile
from megatron_ext.harness.load import opened
from megatron_ext.harness.loaded_tasks import loaded_tasks
from megatron_ext.harness.options import EvaluateOptions
from megatron_ext.harness.text import measure
from megatron_ext.platform.collective import on_first_rank, rank


def evaluate(options: EvaluateOptions, quiet: bool = False) -> dict[str, Any]:
    """Score a model on tasks and texts, write ``--output``; the results, on every rank.

    What can be wrong with tasks and data is found before the model is opened.

    Raises:
        EvaluationError: an unknown task, missing or damaged data, a model without tokenizer.
    """
    platform.activate(options.device)
    if options.output:
        results.refuse_other_content(Path(options.output))
    tasks = loaded_tasks(options) if options.tasks else {}
    asked = {name: _asked(task, options) for name, task in tasks.items()}
    if options.output:
        results.refuse_other_questions(Path(options.output), asked)
    with opened(options) as model, _kept(options, found := results.new(model)) as kept:
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
            if tasks:
                from megatron_ext.harness.language_model import PanguLM

                lm = PanguLM(model, scorer, kept, progress.expect)
                found["tasks"] = _scored(tasks, lm, options.limit, asked)
            if options.bits_per_byte:
                found["texts"] = measure(options.bits_per_byte, model, scorer)
    _warn_of_truncation(found, longest)
    if options.output:
        on_first_rank(lambda: results.write(found, Path(options.output or "")))
    return found


def _asked(task: Any, options: EvaluateOptions) -> dict[str, Any]:
    """What decides a task's questions, by the names of the flags."""
    data = options.data_dir and os.path.realpath(options.data_dir)
    return {"--limit": options.limit, "--num-fewshot": task.get_config("num_fewshot"), "--data-dir": data}


@contextlib.contextmanager
def _kept(options: EvaluateOptions, record: dict[str, Any]) -> Iterator[ScoreFile | None]:
    """What was scored before, in a folder that is this model's; the first rank has it."""
    if not options.output:
        yield None
        return
    folder, made = Path(options.output), list[ScoreFile]()

    def begin() -> None:
        made.append(ScoreFile(folder / results.SCORES))
        results.claim(folder, record)

    try:
        on_first_rank(begin)
        yield made[0] if made else None
    finally:
        for one in made:
            one.close()


def _scored(
    tasks: dict[str, Any], lm: Any, limit: int | None, asked: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The results of each task, on every rank; a collective call."""
    from lm_eval import evaluator

    # Errors of the means are ours, from each item: the harness would draw the same again for some metrics.
    found = evaluator.evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
    return {name: results.of_task(name, found, len(lm.truncated[name]), asked[name]) for name in tasks}


def _warn_of_truncation(found: dict[str, Any], longest: int) -> None:
    cut = {name: task["truncated"] for name, task in found["tasks"].items() if task["truncated"]}
    if cut and rank() == 0:
        told = ", ".join(f"{name} {count}" for name, count in cut.items())
        print(
            f"WARNING: longer than the model's {longest} positions, so read without the beginning: {told} "
            "questions",
            file=sys.stderr,
        )

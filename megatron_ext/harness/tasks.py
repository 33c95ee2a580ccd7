"""Our tasks for lm-evaluation-harness: what the files of task_files/ name.

They work in the harness's own command line as well:

    lm_eval --model hf --model_args pretrained=FOLDER --include_path megatron_ext/harness/task_files \\
        --tasks cmmlu_cloze --metadata '{"data_dir": "../shared/data/eval"}'
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from megatron_ext.evaluation.documents import EvaluationError, Split, documents
from megatron_ext.evaluation.forms import TASKS, Form, Item, item_of, values_of

FILES = Path(__file__).parent / "task_files"


def dataset(task: str, data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The questions of a task: what the harness downloads for its own tasks.

    Raises:
        EvaluationError: there is no data folder, or a file in it is missing or damaged.
    """
    return {"test": datasets.Dataset.from_list(_items(task, data_dir, "test"))}


def _items(task: str, data_dir: str | None, split: Split) -> list[dict[str, Any]]:
    if data_dir is None:
        raise EvaluationError(f"--tasks {task}: is read from local files; --data-dir names their folder")
    benchmark, form = TASKS[task]
    items = [item_of(document, form) for document in documents(benchmark, data_dir, split)]
    return [asdict(item) | {"choices": list(item.choices)} for item in items]


def _values(form: Form, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    return values_of(Item(**doc), form, [logprob for logprob, _ in results])


letters, cloze, bpb = (partial(_values, form) for form in ("letters", "cloze", "bpb"))


class BenchmarkTask(ConfigurableTask):
    """A task whose examples are the first ones of the question's subject, as in the papers of CMMLU and MMLU.

    The harness does not tell its sampler of the question. Examples are read when they are asked for: without
    them a run needs no file of theirs.
    """

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        settings = {name: value for name, value in (config or {}).items() if name != "class"}
        super().__init__(config=settings, **more)

    def fewshot_docs(self) -> list[dict[str, Any]]:
        """None yet."""
        return []

    def examples(self, subject: str, count: int) -> list[dict[str, Any]]:
        """The first ``count`` of a subject.

        Raises:
            EvaluationError: there are fewer, or a file is missing or damaged.
        """
        found = [item for item in self._examples if item["subject"] == subject][:count]
        if len(found) < count:
            raise EvaluationError(f"--num-fewshot {count}: there are {len(found)} examples of {subject}")
        return found

    @cached_property
    def _examples(self) -> list[dict[str, Any]]:
        return _items(self.config.task, self.config.metadata.get("data_dir"), "dev")

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *more: Any, **named: Any) -> Any:
        """The examples and the question."""
        if num_fewshot:
            self.sampler.replace_df(self.examples(doc["subject"], num_fewshot))
        return super().fewshot_context(doc, num_fewshot, *more, **named)

"""Our tasks for lm-evaluation-harness: what the files of task_files/ name.

They work in the harness's own command line as well:

    lm_eval --model hf --model_args pretrained=FOLDER --include_path megatron_ext/harness/task_files \\
        --tasks cmmlu_cloze --metadata '{"data_dir": "../shared/data/eval"}'
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

from megatron_ext.evaluation.documents import BENCHMARKS, EvaluationError, documents
from megatron_ext.evaluation.forms import TASKS, Form, Item, item_of, values_of

FILES = Path(__file__).parent / "task_files"


def dataset(task: str, data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The items of a task, by split: what the harness downloads for its own tasks.

    Raises:
        EvaluationError: there is no data folder, or a file in it is missing or damaged.
    """
    if data_dir is None:
        raise EvaluationError(f"--tasks {task}: is read from local files; --data-dir names their folder")
    benchmark, form = TASKS[task]
    splits = [split for split, files in BENCHMARKS[benchmark].files.items() if files]
    return {
        split: datasets.Dataset.from_list(
            [asdict(item_of(document, form)) for document in documents(benchmark, data_dir, split)]
        )
        for split in splits
    }


def _values(form: Form, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    return values_of(Item(**doc), form, [logprob for logprob, _ in results])


letters, cloze, bpb = (partial(_values, form) for form in ("letters", "cloze", "bpb"))


class OfSubject(ContextSampler):
    """The first examples of one subject, as the papers of CMMLU and MMLU have it."""

    subject = ""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[Any]:
        """``n`` examples.

        Raises:
            EvaluationError: there are fewer.
        """
        found = [doc for doc in self.df if doc["subject"] == self.subject][:n]
        if len(found) < n:
            raise EvaluationError(f"--num-fewshot {n}: there are {len(found)} examples of {self.subject}")
        return found


class BenchmarkTask(ConfigurableTask):
    """A task whose examples are of the question's subject, which the harness does not tell its sampler."""

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        settings = {name: value for name, value in (config or {}).items() if name != "class"}
        super().__init__(config=settings, **more)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *more: Any, **named: Any) -> Any:
        """The examples and the question."""
        if num_fewshot:
            self.sampler.subject = doc["subject"]
        return super().fewshot_context(doc, num_fewshot, *more, **named)

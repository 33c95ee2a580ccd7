"""From the words of ``--tasks`` to tasks of lm-evaluation-harness with their data."""

import difflib
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.common.errors import first_line
from megatron_ext.evaluation.documents import BENCHMARKS, EvaluationError
from megatron_ext.evaluation.forms import TASKS, task_name
from megatron_ext.harness.options import EvaluateOptions

#: The forms that a benchmark's name alone stands for: the cloze form has the bits per byte too.
_USUAL_FORMS = ("letters", "cloze")
_SEED = 1234
#: To wait for the first word of the Hub.
_HUB_SECONDS = 5


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
    if foreign:
        _refuse_what_no_file_names(foreign)
    manager = TaskManager(
        include_path=str(FILES), include_defaults=bool(foreign), metadata={"data_dir": options.data_dir}
    )
    _refuse_unknown(foreign, manager.all_tasks, manager.all_tasks)
    hub = silent_hub() if foreign else None
    tasks: dict[str, Any] = {}
    for name in names:
        tasks |= _of_harness(manager, name, hub) if name in foreign else manager.load([name])["tasks"]
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


def _refuse_unknown(names: Sequence[str], known: Collection[str], near: Iterable[str]) -> None:
    """``near``: names to suggest."""
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    there = [*BENCHMARKS, *TASKS, *sorted(near)]
    close = [found[0] for name in unknown if (found := difflib.get_close_matches(name, there, 1))]
    meant = f" (did you mean {' '.join(close)}?)" if close else ""
    raise EvaluationError(
        f"--tasks {' '.join(unknown)}: unknown{meant}; there are {', '.join(BENCHMARKS)}, each also with "
        "_letters, _cloze or _bpb, and the tasks of lm-evaluation-harness (lm_eval ls tasks)"
    )


def _refuse_what_no_file_names(names: Sequence[str]) -> None:
    """Refuse what stands in none of the harness's files.

    They are read in a second, where its own index of them takes up to a minute.
    """
    import lm_eval.tasks

    files = Path(str(lm_eval.tasks.__file__)).parent.rglob("*.yaml")
    content = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    words = set(re.findall(r"[^\s'\",\[\]]+", content))
    _refuse_unknown(names, words, set(re.findall(r"^(?:task|group)\s*:\s*(\w\S*)", content, re.MULTILINE)))


def silent_hub() -> str | None:
    """The Hub's address, if it does not answer; then nothing is asked of it, as each retry takes seconds."""
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:  # an answer
        return None
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return constants.ENDPOINT
    return None


def _of_harness(manager: Any, name: str, silent: str | None) -> dict[str, Any]:
    """A task, or those of a group, of the harness's own."""
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # of whatever a task's own loader uses
        reason = f"{silent} does not answer" if silent else f"{type(error).__name__}: {first_line(error)}"
        raise EvaluationError(
            f"--tasks {name}: its data cannot be had ({reason}). lm-evaluation-harness downloads it from the "
            "Hugging Face Hub, or finds it in the cache that HF_HOME names"
        ) from error


def _set_examples(name: str, task: Any, asked: int | None) -> None:
    """``--num-fewshot``, where a task allows it; else its own number."""
    if asked is not None:
        if asked and name in TASKS:
            if not BENCHMARKS[TASKS[name][0]].files["dev"]:
                raise EvaluationError(f"--num-fewshot {asked}: {name} has no questions to take examples from")
            for subject in dict.fromkeys(task.test_docs()["subject"]):
                task.examples(subject, asked)  # missing ones are said now
        if task.get_config("num_fewshot") != 0:  # such a task must be asked without
            task.set_config(key="num_fewshot", value=asked)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)

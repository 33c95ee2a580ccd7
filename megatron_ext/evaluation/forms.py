"""A question as a model is asked it, in three forms, and what its answers are worth.

- ``letters``: the choices stand in the question and the answer is a letter, as the paper asks. A small
  model stays at chance for most of its training.
- ``cloze``: the question alone, and the text of each choice as its continuation. The choice with the most
  log-likelihood for each byte is the answer (OLMES, arXiv 2406.08446, normalizes by characters).
- ``bpb``: the right answer's text alone, in bits per byte: falls smoothly long before accuracy rises
  (arXiv 2406.08446 and 2508.13144). The cloze form has this number too, for four times the work.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_ext.evaluation.documents import BENCHMARKS, Document
from megatron_ext.evaluation.fields import LETTERS

Form = Literal["letters", "cloze", "bpb"]
FORMS: tuple[Form, ...] = get_args(Form)
_QUESTION = {"zh": "问题：", "en": "Question: "}
_ANSWER = {"zh": "答案：", "en": "Answer:"}
#: What stands between "Answer:" and an answer's text; Chinese has nothing there.
_BLANK = {"zh": "", "en": " "}


@dataclass(frozen=True)
class Item:
    """A text that is read, the continuations that are compared, and the index of the right one."""

    id: str
    subject: str
    query: str
    choices: tuple[str, ...]
    gold: int


def item_of(document: Document, form: Form) -> Item:
    """A question in a form."""
    language = document.language
    lines = [document.passage] if document.passage else []
    lines.append(_QUESTION[language] + document.question.strip())
    choices = tuple(_BLANK[language] + choice.strip() for choice in document.choices)
    gold = document.gold
    if form == "letters":
        letters = LETTERS[: len(choices)]
        lines += [f"{a}. {choice.strip()}" for a, choice in zip(letters, choices, strict=True)]
        choices = tuple(" " + letter for letter in letters)
    elif form == "bpb":
        choices, gold = (choices[gold],), 0
    return Item(document.id, document.subject, "\n".join([*lines, _ANSWER[language]]), choices, gold)


def task_name(benchmark: str, form: Form) -> str:
    """The name of a task, such as ``cmmlu_cloze``."""
    return f"{benchmark}_{form}"


#: Every task of ours: name -> (benchmark, form).
TASKS: dict[str, tuple[str, Form]] = {
    task_name(benchmark, form): (benchmark, form) for benchmark in BENCHMARKS for form in FORMS
}


def values_of(item: Item, form: Form, logprobs: Sequence[float]) -> dict[str, float]:
    """The numbers of one item from the log-likelihood of each choice, in nats."""
    if form == "letters":
        return {"acc": float(_best(logprobs) == item.gold)}
    lengths = [len(choice.encode()) for choice in item.choices]
    values = {"bits_per_byte": -logprobs[item.gold] / math.log(2) / lengths[item.gold]}
    if form == "cloze":
        each = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
        values = {"acc_bytes": float(_best(each) == item.gold)} | values
    return values


def _best(scores: Sequence[float]) -> int:
    """The index of the highest, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)

"""The questions of six benchmarks, read from local copies in their own formats.

Files are data: CSV, JSON and JSON Lines, read by the standard library. Where a benchmark has subjects, the
questions come in turn, one of each subject, so that the first ``n`` are a spread of all of them.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from megatron_ext.data.text.records import json_kind
from megatron_ext.evaluation.fields import (
    LETTERS,
    as_choices,
    as_text,
    as_texts,
    checked,
    field,
    index_of,
    json_lines,
    parsed,
    text_of,
    texts_of_row,
)

Split = Literal["test", "dev"]


class EvaluationError(ValueError):
    """What cannot be evaluated; the message names the file and record, or the flag."""


@dataclass(frozen=True)
class Document:
    """One question with its answers; ``gold`` is the index of the right one."""

    id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    gold: int
    passage: str = ""
    language: Literal["zh", "en"] = "zh"


@dataclass(frozen=True)
class Benchmark:
    """Where the questions of a benchmark lie below the data folder.

    Attributes:
        title: as the paper's table has it.
        files: patterns of the test questions and of those that examples are taken from; none of these where
            the benchmark has no others.
        read: (path, its content) -> the questions, by the subject that the file's name says.
    """

    title: str
    files: dict[Split, tuple[str, ...]]
    read: Callable[[Path, str], Iterator[Document]]


def documents(name: str, data_dir: str | Path, split: Split = "test") -> list[Document]:
    """The questions of a benchmark, one of each file in turn.

    Raises:
        EvaluationError: a file is missing or damaged; the message says which, and which record.
    """
    benchmark = BENCHMARKS[name]
    by_file = [_read(path, benchmark) for path in _paths(name, Path(data_dir), split)]
    return [document for row in zip_longest(*by_file) for document in row if document is not None]


def _paths(name: str, data_dir: Path, split: Split) -> Iterator[Path]:
    """The files of a split in the order of their names; none where the benchmark has no such split."""
    for pattern in BENCHMARKS[name].files[split]:
        found = sorted((data_dir / name).glob(pattern))
        if not found:
            raise EvaluationError(
                f"{data_dir / name / pattern}: there is no such file; {BENCHMARKS[name].title} is read from "
                "the folder that --data-dir (--eval-tasks-data-dir in training) names"
            )
        yield from found


def _read(path: Path, benchmark: Benchmark) -> list[Document]:
    with _naming(path):
        found = list(benchmark.read(path, _content(path)))
    if not found:
        raise EvaluationError(f"{path}: holds no question")
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Within it, errors of a file's content name the file."""
    try:
        yield
    except EvaluationError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise EvaluationError(f"{path}: {error}") from error


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _cmmlu(path: Path, content: str) -> Iterator[Document]:
    def make(number: int, row: dict[str | None, str]) -> Document:
        question, *choices, answer = texts_of_row(row, ["Question", *"ABCD", "Answer"])
        gold = index_of(answer.strip(), "ABCD", "Answer")
        return Document(f"{path.stem}/{number}", path.stem, question, as_choices(choices, "A to D"), gold)

    return checked(csv.DictReader(io.StringIO(content), strict=True), make, "record")


def _mmlu(path: Path, content: str) -> Iterator[Document]:
    subject = re.sub(r"_(test|dev|val)$", "", path.stem)

    def make(number: int, row: dict[str | None, str]) -> Document:
        names = ["question", *(f"choice{i}" for i in range(4)), "answer"]
        question, *texts, answer = texts_of_row(row, names)
        choices, gold = as_choices(texts, "choices"), index_of(answer.strip(), "0123", "answer")
        return Document(f"{subject}/{number}", subject, question, choices, gold, language="en")

    return checked(csv.DictReader(io.StringIO(content), strict=True), make, "record")


def _c3(path: Path, content: str) -> Iterator[Document]:
    """A file is a list of [lines of the passage, questions on it, id]."""
    subject, passages = path.stem.rpartition("-")[0], parsed(content)
    if not isinstance(passages, list):
        raise ValueError(f"{json_kind(passages)}, not a list of passages")

    def make(number: int, record: Any) -> list[Document]:
        if not isinstance(record, list) or len(record) != 3 or not isinstance(record[1], list):
            raise ValueError("not [lines of the passage, questions, id]")
        lines, questions, identity = record
        passage = as_text("\n".join(as_texts(lines, "line")), "lines of the passage")
        return [_of_c3(one, f"{subject}/{identity}/{i}", passage) for i, one in enumerate(questions)]

    return chain.from_iterable(checked(passages, make, "passage"))


def _of_c3(record: Any, identity: str, passage: str) -> Document:
    choices = as_choices(field(record, "choice"), "choice")
    gold = index_of(text_of(record, "answer").strip(), [choice.strip() for choice in choices], "answer")
    return Document(identity, identity.partition("/")[0], text_of(record, "question"), choices, gold, passage)


def _eprstmt(path: Path, content: str) -> Iterator[Document]:
    """The answers are ours: the files have the English labels only."""

    def make(number: int, record: Any) -> Document:
        gold = index_of(field(record, "label"), ("Positive", "Negative"), "label")
        return Document(
            str(record.get("id", number)),
            "",
            "这条评论的情感是正面的还是负面的？",
            ("正面", "负面"),
            gold,
            text_of(record, "sentence"),
        )

    return checked(json_lines(content), make, "line")


def _piqa(path: Path, content: str) -> Iterator[Document]:
    """The labels lie in a file beside, one a line."""
    beside = path.with_name(f"{path.stem}-labels.lst")
    with _naming(beside):
        labels = _content(beside).split()
        golds = list(checked(labels, lambda _, label: index_of(label, "01", "label"), "line"))
    records = list(json_lines(content))
    if len(golds) != len(records):
        raise ValueError(f"{len(records)} questions, but {beside.name} has {len(golds)} labels")

    def make(number: int, record: Any) -> Document:
        question, gold = text_of(record, "goal"), golds[number - 1]
        choices = as_choices([field(record, "sol1"), field(record, "sol2")], "sol")
        return Document(str(record.get("id", number)), "", question, choices, gold, language="en")

    return checked(records, make, "line")


def _agieval(path: Path, content: str) -> Iterator[Document]:
    """Options begin with their letter in brackets, which is left out."""

    def make(number: int, record: Any) -> Document:
        label, options = field(record, "label"), as_texts(field(record, "options"), "options")
        if isinstance(label, list):
            raise ValueError(f"label: {label}; subjects with several right answers are not asked here")
        choices = as_choices([re.sub(r"^\s*\(\w\)\s*", "", option) for option in options], "options")
        passage = record.get("passage") or ""
        return Document(
            f"{path.stem}/{number}",
            path.stem,
            text_of(record, "question"),
            choices,
            index_of(label, LETTERS[: len(choices)], "label"),
            as_text(passage, "passage") if passage != "" else "",
            "en" if path.stem.endswith("-en") else "zh",
        )

    return checked(json_lines(content), make, "line")


#: By the name that --tasks takes, in the order of the paper's table.
BENCHMARKS = {
    "cmmlu": Benchmark("CMMLU", {"test": ("test/*.csv",), "dev": ("dev/*.csv",)}, _cmmlu),
    "mmlu": Benchmark("MMLU", {"test": ("test/*.csv",), "dev": ("dev/*.csv",)}, _mmlu),
    "agieval": Benchmark("AGI-Eval", {"test": ("*.jsonl",), "dev": ()}, _agieval),
    "piqa": Benchmark("PIQA", {"test": ("dev.jsonl",), "dev": ()}, _piqa),
    "eprstmt": Benchmark("EPRSTMT", {"test": ("test_public.json",), "dev": ("train_0.json",)}, _eprstmt),
    "c3": Benchmark("C3", {"test": ("c3-?-test.json",), "dev": ("c3-?-dev.json",)}, _c3),
}

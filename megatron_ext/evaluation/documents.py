"""The questions of six benchmarks, read from local copies in their own formats.

Files are data: CSV, JSON and JSON Lines, read by the standard library. Where a benchmark has subjects, the
questions come in turn, one of each subject, so that the first ``n`` are a spread of all of them.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

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
    try:
        found = list(benchmark.read(path, path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise EvaluationError(f"{path}: {error}") from error
    if not found:
        raise EvaluationError(f"{path}: holds no question")
    return found


def _checked(records: Iterable[Any], make: Callable[[int, Any], Document], what: str) -> Iterator[Document]:
    """``make`` of each record; an error of a record says which it is."""
    for number, record in enumerate(records, 1):
        try:
            document = make(number, record)
            if not all(
                isinstance(text, str) and text.strip() for text in (document.question, *document.choices)
            ):
                raise ValueError("a question or an answer is empty")
            if not 0 <= document.gold < len(document.choices) or len(document.choices) < 2:
                raise ValueError(f"answer {document.gold} of {len(document.choices)}")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{what} {number}: not a question of this benchmark ({reason})") from None
        yield document


def _json_lines(text: str) -> Iterator[Any]:
    lines = text.removesuffix("\n").split("\n") if text else []  # a text may hold other line ends
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: not JSON ({error.msg})") from None


def _cmmlu(path: Path, text: str) -> Iterator[Document]:
    def make(number: int, row: dict[str, str]) -> Document:
        choices = tuple(row[letter] for letter in "ABCD")
        gold = [*"ABCD"].index(row["Answer"].strip())
        return Document(f"{path.stem}/{number}", path.stem, row["Question"], choices, gold)

    return _checked(csv.DictReader(io.StringIO(text)), make, "record")


def _mmlu(path: Path, text: str) -> Iterator[Document]:
    subject = re.sub(r"_(test|dev|val)$", "", path.stem)

    def make(number: int, row: dict[str, str]) -> Document:
        choices = tuple(row[f"choice{i}"] for i in range(4))
        return Document(
            f"{subject}/{number}", subject, row["question"], choices, int(row["answer"]), language="en"
        )

    return _checked(csv.DictReader(io.StringIO(text)), make, "record")


def _c3(path: Path, text: str) -> Iterator[Document]:
    """A file is a list of [lines of the passage, questions on it, id]."""
    subject = path.stem.rpartition("-")[0]
    records = (
        ("\n".join(lines), question, f"{identity}/{i}")
        for lines, questions, identity in json.loads(text)
        for i, question in enumerate(questions)
    )

    def make(number: int, record: tuple[str, dict[str, Any], str]) -> Document:
        passage, question, identity = record
        choices = tuple(question["choice"])
        gold = choices.index(question["answer"])
        return Document(f"{subject}/{identity}", subject, question["question"], choices, gold, passage)

    return _checked(records, make, "question")


def _eprstmt(path: Path, text: str) -> Iterator[Document]:
    """The answers are ours: the files have the English labels only."""

    def make(number: int, record: dict[str, Any]) -> Document:
        gold = ("Positive", "Negative").index(record["label"])
        return Document(
            str(record["id"]),
            "",
            "这条评论的情感是正面的还是负面的？",
            ("正面", "负面"),
            gold,
            record["sentence"],
        )

    return _checked(_json_lines(text), make, "line")


def _piqa(path: Path, text: str) -> Iterator[Document]:
    """The labels lie in a file beside, one a line."""
    labels = path.with_name(f"{path.stem}-labels.lst").read_text(encoding="utf-8").split()
    records = list(_json_lines(text))
    if len(labels) != len(records):
        raise ValueError(f"{len(records)} questions, but {path.stem}-labels.lst has {len(labels)} labels")

    def make(number: int, record: dict[str, Any]) -> Document:
        choices = (record["sol1"], record["sol2"])
        return Document(
            record.get("id", str(number)), "", record["goal"], choices, int(labels[number - 1]), language="en"
        )

    return _checked(records, make, "line")


def _agieval(path: Path, text: str) -> Iterator[Document]:
    """Options begin with their letter in brackets, which is left out."""

    def make(number: int, record: dict[str, Any]) -> Document:
        choices = tuple(re.sub(r"^\s*\(\w\)\s*", "", option) for option in record["options"])
        return Document(
            f"{path.stem}/{number}",
            path.stem,
            record["question"],
            choices,
            [*"ABCDEFG"].index(record["label"]),
            record["passage"] or "",
            "en" if path.stem.endswith("-en") else "zh",
        )

    return _checked(_json_lines(text), make, "line")


#: By the name that --tasks takes, in the order of the paper's table.
BENCHMARKS = {
    "cmmlu": Benchmark("CMMLU", {"test": ("test/*.csv",), "dev": ("dev/*.csv",)}, _cmmlu),
    "mmlu": Benchmark("MMLU", {"test": ("test/*.csv",), "dev": ("dev/*.csv",)}, _mmlu),
    "agieval": Benchmark("AGI-Eval", {"test": ("*.jsonl",), "dev": ()}, _agieval),
    "piqa": Benchmark("PIQA", {"test": ("dev.jsonl",), "dev": ()}, _piqa),
    "eprstmt": Benchmark("EPRSTMT", {"test": ("test_public.json",), "dev": ("train_0.json",)}, _eprstmt),
    "c3": Benchmark("C3", {"test": ("c3-?-test.json",), "dev": ("c3-?-dev.json",)}, _c3),
}

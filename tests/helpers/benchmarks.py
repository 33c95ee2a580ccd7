"""Small copies of the benchmarks, in their own formats, with questions of made text."""

import csv
import json
import random
from pathlib import Path

from tests.unit.tokenizer.sample_models import corpus_lines


def write(folder: Path, questions: int = 12) -> Path:
    """All six benchmarks; returns ``folder``."""
    draw = random.Random(5)
    lines = iter(corpus_lines(draw, 4000))

    def choices(count: int = 4) -> list[str]:
        return [f"{next(lines)[: draw.randint(2, 40)].strip()} {i}" for i in range(count)]

    for split in ("test", "dev"):
        for subject in ("agronomy", "anatomy"):
            rows = [[i, next(lines), *choices(), draw.choice("ABCD")] for i in range(questions)]
            _csv(folder / f"cmmlu/{split}/{subject}.csv", ["", "Question", *"ABCD", "Answer"], rows)
            rows = [[next(lines), *choices(), draw.randrange(4)] for _ in range(questions)]
            head = ["question", *(f"choice{i}" for i in range(4)), "answer"]
            _csv(folder / f"mmlu/{split}/{subject}_{split}.csv", head, rows)
        for kind in "dm":
            _write(folder / f"c3/c3-{kind}-{split}.json", json.dumps(_c3(lines, choices, questions)))
    for name in ("test_public", "train_0"):
        labels = ("Positive", "Negative")
        records = [{"id": i, "sentence": next(lines), "label": labels[i % 2]} for i in range(questions)]
        _json_lines(folder / f"eprstmt/{name}.json", records)
    pairs = [choices(2) for _ in range(questions)]
    _json_lines(folder / "piqa/dev.jsonl", [{"goal": next(lines), "sol1": a, "sol2": b} for a, b in pairs])
    _write(folder / "piqa/dev-labels.lst", "".join(f"{draw.randrange(2)}\n" for _ in pairs))
    for subject in ("gaokao-biology", "logiqa-en"):
        records = [
            {"passage": next(lines), "question": next(lines), "label": draw.choice("ABCD")}
            | {"options": [f"({a}){b}" for a, b in zip("ABCD", choices(), strict=True)]}
            for _ in range(questions)
        ]
        _json_lines(folder / f"agieval/{subject}.jsonl", records)
    return folder


def _c3(lines, choices, questions: int) -> list:
    made = []
    for i in range(questions):
        answers = choices(3)
        passage = [next(lines) for _ in range(6)]
        question = {"question": next(lines), "choice": answers, "answer": answers[i % 3]}
        made.append([passage, [question], str(i)])
    return made


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _json_lines(path: Path, records: list[dict]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _csv(path: Path, head: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])

#!/usr/bin/env python
"""Text to token ids, side by side in one run: the tokenizer's own library, others, and ours.

For every tokenizer (SentencePiece file or Hugging Face folder) and language the contenders encode the same
documents in turn, round after round. The table shows the median over the rounds of MB of UTF-8 text per CPU
second, and the median of each round's ratio to the tokenizer's own library, called text by text. CPU seconds
are those of the whole process, so two threads that share the work perfectly show the same number as one; the
second pair of columns is wall time. "cold" remembers nothing; "warm" comes after other text of all languages.
The last column is the number of documents whose ids are not the own library's.

What is not installed, or does not read a tokenizer, is said: pip install gigatoken tiktoken kitoken

    python benchmarks/tokenization.py --data ../shared/data --rounds 5 --png tokenize.png
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# One thread each, unless a row says otherwise.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

import argparse
import gzip
import json
import statistics
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from benchmarks.tokenization_contenders import Absent, Contender, Work, contenders, seconds, versions

LANGUAGES = {"English": "en", "Chinese": "zh", "code": "code"}
MODELS = ["internlm-103168.model", "llama-32000.model", "qwen2-151646", "p50k-50283"]


@dataclass
class Corpus:
    """Documents to encode, others to warm up with, and the size of the former in MB."""

    documents: list[str]
    others: list[str]
    megabytes: float


def load_corpus(data: Path, short_name: str, megabytes: float) -> Corpus:
    """The last documents of train_<short_name>; `others` are the first half of the rest."""
    path = data / "corpus" / f"train_{short_name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    documents: list[str] = []
    size = 0
    while texts and size < megabytes * 1e6:
        documents.append(texts.pop())
        size += len(documents[-1].encode())
    return Corpus(documents, texts[: len(texts) // 2], size / 1e6)


def rows_of(found: dict[str, Contender]) -> dict[str, tuple[Contender, bool]]:
    """Row -> (contender, whether it is warm); one row for those that remember nothing."""
    rows = {}
    for name, contender in found.items():
        if contender.remembers:
            rows |= {f"{name}, cold": (contender, False), f"{name}, warm": (contender, True)}
        else:
            rows[name] = (contender, False)
    return rows


def measure(
    rows: dict[str, tuple[Contender, bool]], corpus: Corpus, warm_up: list[str], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of each round for each row; rows take turns within a round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    loaded: dict[str, Work] = {}
    for _ in range(rounds):
        for name, (contender, warm) in rows.items():
            if name not in loaded or (contender.remembers and contender.forget is None):
                loaded[name] = contender.load()
            if contender.forget is not None:
                contender.forget()
            if warm:
                loaded[name](warm_up)
            taken[name].append(seconds(loaded[name], corpus.documents))
    return taken


def summarize(taken: dict[str, list[tuple[float, float]]], megabytes: float) -> dict[str, dict]:
    """Medians: MB per CPU second and per second, and ratios to the first row of the same round."""
    base = next(iter(taken.values()))
    median = statistics.median
    return {
        name: {
            "mb_per_cpu_s": median(megabytes / cpu for cpu, _ in times),
            "mb_per_s": median(megabytes / wall for _, wall in times),
            "ratio_cpu": median(b[0] / t[0] for b, t in zip(base, times, strict=True)),
            "ratio_wall": median(b[1] / t[1] for b, t in zip(base, times, strict=True)),
        }
        for name, times in taken.items()
    }


def differing(found: dict[str, Contender], documents: list[str]) -> dict[str, int]:
    """Documents whose ids are not those of the first contender, of each."""
    ids = {name: _each(contender.load()(documents)) for name, contender in found.items()}
    own = next(iter(ids.values()))
    return {name: sum(a != b for a, b in zip(own, theirs, strict=True)) for name, theirs in ids.items()}


def _each(ids: object) -> list[list[int]]:
    """The ids of each document, whether they came one by one or as (all, sizes)."""
    if isinstance(ids, tuple):
        flat, sizes = ids[0].tolist(), ids[1].tolist()
        ends = list(accumulate(sizes))
        return [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [[int(i) for i in document] for document in ids]  # type: ignore[attr-defined]


def draw(results: list[dict], path: Path) -> None:
    """Bars of MB per CPU second, one panel a tokenizer model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in results))
    shown = ["sentencepiece", "tokenizers", "gigatoken, cold", "gigatoken, warm", "ours, cold", "ours, warm"]
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        panel = [r for r in results if r["model"] == model]
        for k, name in enumerate(shown):
            values = [r["rows"].get(name, {}).get("mb_per_cpu_s", 0.0) for r in panel]
            axis.bar([i + 0.14 * k for i in range(len(panel))], values, 0.14, label=name)
        axis.set_xticks([i + 0.3 for i in range(len(panel))], [r["language"] for r in panel])
        axis.set_title(model)
    axes[0][0].set_ylabel("MB per CPU second, one thread")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_table(result: dict) -> None:
    """One block of the table."""
    print(f"\n{result['model']}, {result['language']}, {result['megabytes']:.1f} MB")
    print(f"{'':28}{'MB/CPU s':>10}{'x':>8}{'MB/s':>10}{'x':>8}{'differ':>8}")
    for name, row in result["rows"].items():
        print(
            f"{name:28}{row['mb_per_cpu_s']:>10.1f}{row['ratio_cpu']:>8.1f}"
            f"{row['mb_per_s']:>10.1f}{row['ratio_wall']:>8.1f}{row['differing']:>8}",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus/ and tokenizers/")
    parser.add_argument("--models", nargs="+", default=MODELS, help="names below tokenizers/")
    parser.add_argument("--languages", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES))
    parser.add_argument("--megabytes", type=float, default=2.0, help="text per language (default 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=None, help="contenders besides the own library")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead")
    parser.add_argument("--png", type=Path, help="write a bar chart")
    return parser.parse_args()


def main() -> None:
    """Runs every tokenizer and language."""
    args = parse_args()
    corpora = {name: load_corpus(args.data, LANGUAGES[name], args.megabytes) for name in args.languages}
    warm_up = [text for corpus in corpora.values() for text in corpus.others]
    results = []
    for model in args.models:
        found, absent = {}, {}
        for name, contender in contenders(args.data / "tokenizers" / model):
            if isinstance(contender, Absent):
                absent[name] = str(contender)
            elif not found or not args.only or name in args.only:
                found[name] = contender
        if not args.json:
            print("".join(f"\n{model}: {name} left out: {why}" for name, why in absent.items()))
        for language, corpus in corpora.items():
            results.append(
                {"model": model, "language": language, "megabytes": corpus.megabytes, "absent": absent}
            )
            differ = differing(found, corpus.documents)
            rows = summarize(measure(rows_of(found), corpus, warm_up, args.rounds), corpus.megabytes)
            for name, row in rows.items():
                row["differing"] = differ[name.removesuffix(", cold").removesuffix(", warm")]
            results[-1]["rows"] = rows
            if not args.json:
                print_table(results[-1])
    if args.json:
        print(json.dumps({"versions": versions(), "results": results}))
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    main()

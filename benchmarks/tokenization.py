#!/usr/bin/env python
"""Text to token ids, side by side in one run: sentencepiece, Hugging Face tokenizers and ours.

For every tokenizer model and language the candidates encode the same documents in turn, round after round.
The table shows the median over the rounds of MB of UTF-8 text per CPU second, and the median of each round's
ratio to sentencepiece called text by text. CPU seconds are those of the whole process, so two threads that
share the work perfectly show the same number as one; the second pair of columns is wall time. "cold" empties
our cache first; "warm" fills it with other text of all languages first.

    python benchmarks/tokenization.py --data ../shared/data --rounds 5 --png tokenize.png
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import gzip
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.hf_export import NotExpressible, fast_tokenizer

LANGUAGES = {"English": "en", "Chinese": "zh", "code": "code"}
BASELINE = "sentencepiece"


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


def candidates(encoder: NativeEncoder, corpus: Corpus, warm_up: list[str]) -> dict[str, tuple]:
    """Name -> (preparation, work); both take no arguments, only the work is timed."""
    processor, documents = encoder.processor, corpus.documents

    def nothing() -> None: ...

    def cold() -> None:
        encoder.clear_cache()

    def warm() -> None:
        encoder.clear_cache()
        encoder.count(warm_up)

    def warm_two() -> None:
        encoder.clear_cache()
        encoder.count(warm_up, num_threads=2)

    rows = {
        BASELINE: (nothing, lambda: [processor.encode(text) for text in documents]),
        "sentencepiece batch, 2 threads": (nothing, lambda: processor.encode(documents, num_threads=2)),
        "ours, cold": (cold, lambda: encoder.encode_batch(documents)),
        "ours, warm": (warm, lambda: encoder.encode_batch(documents)),
        "ours, cold, 2 threads": (cold, lambda: encoder.encode_batch(documents, num_threads=2)),
        "ours, warm, 2 threads": (warm_two, lambda: encoder.encode_batch(documents, num_threads=2)),
        "ours, warm, count only": (warm, lambda: encoder.count(documents)),
        "ours, one by one": (warm, lambda: [encoder.encode(text) for text in documents]),
    }
    with contextlib.suppress(NotExpressible):
        hugging_face = fast_tokenizer(encoder)
        rows["Hugging Face tokenizers"] = (
            nothing,
            lambda: [hugging_face.encode(text, add_special_tokens=False) for text in documents],
        )
    return rows


def measure(rows: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) of each round for each row; rows take turns within a round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (prepare, work) in rows.items():
            prepare()
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


def summarize(seconds: dict[str, list[tuple[float, float]]], megabytes: float) -> dict[str, dict]:
    """Medians: MB per CPU second and per second, and ratios to the baseline of the same round."""
    base = seconds[BASELINE]
    median = statistics.median
    return {
        name: {
            "mb_per_cpu_s": median(megabytes / cpu for cpu, _ in times),
            "mb_per_s": median(megabytes / wall for _, wall in times),
            "ratio_cpu": median(b[0] / t[0] for b, t in zip(base, times, strict=True)),
            "ratio_wall": median(b[1] / t[1] for b, t in zip(base, times, strict=True)),
        }
        for name, times in seconds.items()
    }


def check_equal(encoder: NativeEncoder, documents: list[str]) -> None:
    """The ids must be sentencepiece's own, or the numbers mean nothing."""
    for i, (ours, text) in enumerate(zip(encoder.encode_batch(documents), documents, strict=True)):
        if ours.tolist() != encoder.processor.encode(text):
            raise SystemExit(f"document {i}: ids differ from sentencepiece's")


def draw(results: list[dict], path: Path) -> None:
    """Bars of MB per CPU second, one panel a tokenizer model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in results))
    shown = [BASELINE, "Hugging Face tokenizers", "ours, cold", "ours, warm"]
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        panel = [r for r in results if r["model"] == model]
        for k, name in enumerate(shown):
            values = [r["rows"].get(name, {}).get("mb_per_cpu_s", 0.0) for r in panel]
            axis.bar([i + 0.2 * k for i in range(len(panel))], values, 0.2, label=name)
        axis.set_xticks([i + 0.3 for i in range(len(panel))], [r["language"] for r in panel])
        axis.set_title(model)
    axes[0][0].set_ylabel("MB per CPU second, one thread")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_table(result: dict) -> None:
    """One block of the table."""
    print(f"\n{result['model']}, {result['language']}, {result['megabytes']:.1f} MB")
    print(f"{'':34}{'MB/CPU s':>10}{'x':>8}{'MB/s':>10}{'x':>8}")
    for name, row in result["rows"].items():
        print(
            f"{name:34}{row['mb_per_cpu_s']:>10.1f}{row['ratio_cpu']:>8.1f}"
            f"{row['mb_per_s']:>10.1f}{row['ratio_wall']:>8.1f}",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus/ and tokenizers/")
    parser.add_argument("--models", nargs="+", default=["internlm-103168", "llama-32000"])
    parser.add_argument("--languages", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES))
    parser.add_argument("--megabytes", type=float, default=2.0, help="text per language (default 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=None, help="rows to run besides the baseline")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead")
    parser.add_argument("--png", type=Path, help="write a bar chart")
    return parser.parse_args()


def main() -> None:
    """Runs every model and language."""
    args = parse_args()
    corpora = {name: load_corpus(args.data, LANGUAGES[name], args.megabytes) for name in args.languages}
    warm_up = [text for corpus in corpora.values() for text in corpus.others]
    results = []
    for model in args.models:
        encoder = NativeEncoder(args.data / "tokenizers" / f"{model}.model")
        for language, corpus in corpora.items():
            check_equal(encoder, corpus.documents)
            rows = candidates(encoder, corpus, warm_up)
            if args.only:
                rows = {name: row for name, row in rows.items() if name in [BASELINE, *args.only]}
            summary = summarize(measure(rows, args.rounds), corpus.megabytes)
            results.append(
                {"model": model, "language": language, "megabytes": corpus.megabytes, "rows": summary}
            )
            if not args.json:
                print_table(results[-1])
    if args.json:
        print(json.dumps({"results": results}))
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    main()

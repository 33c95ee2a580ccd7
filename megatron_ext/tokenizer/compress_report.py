"""What a compressed tokenizer costs and saves: numbers, a chart, and a page of Markdown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import write_aside, write_json
from megatron_ext.config.data import padded
from megatron_ext.tokenizer.compress import Compressible, Vocabulary, removal_order
from megatron_ext.tokenizer.counts import Counts

SIZES = (8000, 12000, 16000, 20000, 24000, 30000, 32000, 40000, 48000, 56000, 64000, 80000, 100000, 128000)
#: Guidelines of arXiv 2402.02791, section 3: coverage above, share of embedding and head below.
MIN_COVERAGE, MAX_SHARE = 0.90, 0.20


def curve(vocabulary: Vocabulary, counts: Counts, sizes: list[int]) -> list[dict[str, Any]]:
    """Coverage and fertility of each group at several vocabulary sizes, largest first.

    Coverage: share of the full tokenizer's tokens whose piece stays. Fertility: tokens per byte, with
    a dropped piece counted as the parts of its last merge, which comes close to encoding the text again.
    """
    original = counts.counts
    before = original.sum(axis=1).astype(np.float64)
    text_bytes = np.maximum(counts.text_bytes, 1)
    lost, added = np.zeros(len(before)), np.zeros(len(before))
    left = len(vocabulary.texts)
    wanted = sorted({size for size in sizes if size <= left} | {left}, reverse=True)
    points: list[dict[str, Any]] = []

    def note() -> None:
        while wanted and left == wanted[0]:
            size = wanted.pop(0)
            whole = {
                "coverage": float(1 - lost.sum() / max(before.sum(), 1)),
                "tokens_per_byte": float((before.sum() + added.sum()) / text_bytes.sum()),
            }
            coverage, fertility = 1 - lost / np.maximum(before, 1), (before + added) / text_bytes
            groups = {
                name: {"coverage": float(coverage[i]), "tokens_per_byte": float(fertility[i])}
                for i, name in enumerate(counts.groups)
            }
            points.append({"vocab_size": size, **whole, "groups": groups})

    note()
    for i, growth in removal_order(vocabulary, original):
        left -= 1
        lost += original[:, i]
        added += growth
        note()
        if not wanted:
            break
    return points


def add_shares(points: list[dict[str, Any]], preset_name: str) -> None:
    """Adds to each point the share of embedding and output head in the parameters of a preset."""
    from megatron_ext.config.describe import embedding_share
    from megatron_ext.config.presets import preset

    for point in points:
        rows = padded(point["vocab_size"])
        model = dataclasses.replace(preset(preset_name), softmax_vocab_size=None, padded_vocab_size=rows)
        point["embedding_share"] = embedding_share(model)


def recommend(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The sizes that keep both guidelines, the largest of them recommended (None if there is none)."""
    fits = [
        point["vocab_size"]
        for point in points
        if point["coverage"] > MIN_COVERAGE and point.get("embedding_share", 1.0) < MAX_SHARE
    ]
    return {
        "vocab_size": max(fits, default=None),
        "smallest": min(fits, default=None),
        "rule": f"coverage above {MIN_COVERAGE:.0%}, embedding and head below {MAX_SHARE:.0%}",
    }


def examples(
    vocabulary: Vocabulary, counts: np.ndarray, kept: np.ndarray, number: int = 20
) -> dict[str, Any]:
    """Some pieces with their counts: the most frequent dropped, the rarest kept, the dead ones dropped."""
    is_kept = np.zeros(len(counts), dtype=bool)
    is_kept[kept] = True
    normal = np.flatnonzero(~vocabulary.fixed & ~vocabulary.fillers & ~vocabulary.dead)
    by_count = normal[np.argsort(-counts[normal], kind="stable")]

    def show(ids: np.ndarray) -> list[list[Any]]:
        return [[vocabulary.texts[i], int(counts[i])] for i in ids.tolist()]

    return {
        "dropped_most_frequent": show(by_count[~is_kept[by_count]][:number]),
        "kept_rarest": show(by_count[is_kept[by_count]][::-1][:number]),
        "dropped_unreachable": show(np.flatnonzero(vocabulary.dead & ~is_kept)[:number]),
    }


def compare(
    old: Compressible, new: Compressible, documents: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Per group: tokens and bytes per token before and after, and documents that do not come back exactly."""
    result = {}
    for group, texts in documents.items():
        size = sum(len(text.encode()) for text in texts)
        (before, _), (after, failed) = old.round_trip(texts), new.round_trip(texts)
        result[group] = {
            "documents": len(texts),
            "bytes": size,
            "tokens_before": before,
            "tokens_after": after,
            "bytes_per_token_before": size / max(before, 1),
            "bytes_per_token_after": size / max(after, 1),
            "round_trip_failures": failed,
        }
    return result


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes report.json, report.md and, where matplotlib is installed, report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    drawn = _draw(report, folder / "report.png")
    write_aside(folder / "report.md", _markdown(report, drawn).encode())


def _markdown(report: dict[str, Any], initialized: bool) -> str:
    lines = [
        f"# {report['old_size']:,} -> {report['new_size']:,} pieces",
        "",
        f"Counted: {report['counted_tokens']:,} tokens in {report['counted_bytes'] / 1e6:,.1f} MB. "
        f"Unreachable pieces: {report['unreachable_before']} before, {report['unreachable_after']} after.",
        "",
    ]
    if initialized:
        lines += ["![coverage and tokens per byte against vocabulary size](report.png)", ""]
    recommended = report["recommended"]
    lines += [
        f"Recommended ({recommended['rule']}): **{recommended['vocab_size'] or 'no size fits both'}**.",
        "",
    ]
    lines += ["| pieces | coverage | tokens per byte | embedding and head |", "| --- | --- | --- | --- |"]
    for point in report["curve"]:
        share = f"{point['embedding_share']:.1%}" if "embedding_share" in point else ""
        row = (
            f"{point['vocab_size']:,}",
            f"{point['coverage']:.2%}",
            f"{point['tokens_per_byte']:.4f}",
            share,
        )
        lines.append(f"| {' | '.join(row)} |")
    lines += _by_group(report["curve"], "coverage", "{:.1%}")
    lines += _by_group(report["curve"], "tokens_per_byte", "{:.3f}")
    if report["held_out"]:
        lines += [
            "",
            "## Held-out text",
            "",
            "| group | bytes per token before | after | tokens | round trip |",
        ]
        lines += ["| --- | --- | --- | --- | --- |"]
        for group, row in report["held_out"].items():
            more = row["tokens_after"] / max(row["tokens_before"], 1) - 1
            trip = "exact" if row["round_trip_failures"] == 0 else f"{row['round_trip_failures']} fail"
            before, after = row["bytes_per_token_before"], row["bytes_per_token_after"]
            lines.append(f"| {group} | {before:.3f} | {after:.3f} | {more:+.2%} | {trip} |")
    for title, rows in report["examples"].items():
        shown = ", ".join(f"`{piece!r}` {count:,}" for piece, count in rows) or "none"
        lines += ["", f"**{title.replace('_', ' ')}**: {shown}"]
    return "\n".join(lines) + "\n"


def _by_group(points: list[dict[str, Any]], what: str, form: str) -> list[str]:
    """A table of one number: groups of the counted text down, vocabulary sizes across."""
    sizes = " | ".join(f"{point['vocab_size']:,}" for point in points)
    lines = ["", f"## {what.replace('_', ' ').replace('per', 'a').capitalize()} of each group", ""]
    lines += [f"| group | {sizes} |", f"| --- |{' --- |' * len(points)}"]
    for group in points[0]["groups"]:
        cells = " | ".join(form.format(point["groups"][group][what]) for point in points)
        lines.append(f"| {group} | {cells} |")
    return lines


def _draw(report: dict[str, Any], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = report["curve"]
    sizes = [point["vocab_size"] for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4))
    left.plot(sizes, [point["coverage"] for point in points], "k.-", label="coverage, all")
    if "embedding_share" in points[0]:
        left.plot(sizes, [point["embedding_share"] for point in points], "r.--", label="embedding and head")
    left.axhline(MIN_COVERAGE, color="grey", linewidth=0.5)
    left.axhline(MAX_SHARE, color="grey", linewidth=0.5)
    for number, group in enumerate(list(points[0]["groups"])[:20]):
        fertility = [point["groups"][group]["tokens_per_byte"] for point in points]
        right.plot(sizes, fertility, ".-", label=group, linewidth=1, color=plt.cm.tab20(number))
    right.set_ylabel("tokens per byte")
    for axis in (left, right):
        axis.axvline(report["new_size"], color="grey", linestyle=":")
        axis.set_xlabel("pieces")
    left.legend(fontsize=7)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True

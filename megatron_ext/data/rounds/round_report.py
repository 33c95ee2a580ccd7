"""The report of a round: a few lines of text and a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import write_picture
from megatron_ext.data.rounds.build_round import Report

LINES = 12


def text(manifest: dict[str, Any], report: Report) -> str:
    """Counts, the histogram of losses and the shares of the sources, as text."""
    losses = manifest["losses"]
    known = f"{losses['kind']} losses" if manifest["dataset"] else "plain losses, no manifest: not checked"
    lines = [
        f"round {manifest['round']}: {manifest['selected']:,} of {manifest['samples']:,} samples, "
        f"{manifest['groups_drawn']:,} of {manifest['groups']:,} groups of {manifest['group_size']} "
        f"({known})",
        "",
        f"{'group loss':>19} {'groups':>12} {'expected':>12} {'drawn':>12} {'share':>7}",
    ]
    merged = _merge(report)
    for low, high, groups, expected, kept in merged:
        share = f"{kept / groups:7.1%}" if groups else "      -"
        lines.append(f"{low:9.4f} {high:9.4f} {groups:12,} {expected:12,.1f} {kept:12,} {share}")
    lines += ["", f"{'source':<32} {'before':>8} {'after':>8} {'expected':>12} {'drawn':>12}"]
    for row in report.as_json()["sources"]:
        lines.append(
            f"{row['name'][:32]:<32} {row['share_before']:8.2%} {row['share_after']:8.2%} "
            f"{row['expected']:12,.1f} {row['drawn']:12,}"
        )
    return "\n".join(lines)


def _merge(report: Report) -> list[tuple[float, float, int, float, int]]:
    """The histogram, merged into at most ``LINES`` rows."""
    bins = len(report.groups)
    bounds = np.unique(np.linspace(0, bins, LINES + 1).astype(int))
    return [
        (
            report.edges[a], report.edges[b], int(report.groups[a:b].sum()),
            float(report.expected[a:b].sum()), int(report.kept[a:b].sum()),
        )
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]  # fmt: skip


def plot(manifest: dict[str, Any], report: Report, path: Path) -> None:
    """Draw the losses of kept and dropped groups, and the share kept against the loss.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    centers, width = (report.edges[:-1] + report.edges[1:]) / 2, np.diff(report.edges)
    dropped = report.groups - report.kept
    left.bar(centers, report.kept, width, label="kept", color="C0")
    left.bar(centers, dropped, width, bottom=report.kept, label="dropped", color="C7", alpha=0.6)
    left.set(xlabel="loss of the group (nats per token)", ylabel="groups")
    left.legend()
    seen = report.groups > 0
    right.plot(centers[seen], report.expected[seen] / report.groups[seen], "k-", label="expected")
    right.plot(centers[seen], report.kept[seen] / report.groups[seen], "C0o", markersize=4, label="drawn")
    right.axhline(manifest["rate"], color="C7", linestyle=":", label="rate")
    right.set(xlabel="loss of the group (nats per token)", ylabel="share kept", ylim=(0, 1.05))
    right.legend()
    figure.suptitle(f"round {manifest['round']}: {manifest['selected']:,} of {manifest['samples']:,} samples")
    write_picture(figure, path)
    pyplot.close(figure)

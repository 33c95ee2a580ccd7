"""Selects the samples of the next round by their losses (arXiv 2402.02791, section 3).

Samples are selected in groups, as they are trained in batches. With the group losses l_1 .. l_N of the frozen
model, p_i = exp(l_i / T) / sum_j exp(l_j / T), and N_0 of the N groups are sampled without replacement:
samples with a high loss, often those that the model saw early and forgot, are likely to be trained on again.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from megatron_ext.common.files import (
    Watch,
    refuse_overwriting,
    refuse_replacing,
    unchanged,
    write_aside,
    write_json,
)
from megatron_ext.common.flags import flag, wrong_fields
from megatron_ext.common.progress import Progress
from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds import sampling as drawing
from megatron_ext.data.rounds.dataset import FORMAT, RoundPaths, round_paths
from megatron_ext.data.rounds.loss_record import Losses, read_losses, record_paths

HISTOGRAM_BINS = 60
#: Number of bins for the losses, from which the expected numbers of samples are calculated.
FINE_BINS = 6000
#: Number of samples with a bad loss that an error names.
NAMED = 10


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How the samples of a round are selected; each field is a flag of tools/build_round.py."""

    rate: float = flag(above=0, maximum=1)
    """Fraction of the groups to select."""

    group_size: int = flag(1, minimum=1, below=2**53)
    """Number of samples in a group, which are selected together."""

    temperature: float = flag(1.0, minimum=1e-9, maximum=1e9)
    """Temperature of the softmax."""

    seed: int = flag(1234, minimum=0)
    """Seed of the selection."""

    rounds_seen: int = flag(1, minimum=1)
    """Number of rounds trained so far; part of the seed, so that each round has a new selection."""

    per_source: bool = False
    """Apply the rate to every source of a blend separately, which keeps the blend's proportions."""

    order: Literal["shuffled", "training"] = "shuffled"
    """Order of the samples in training: shuffled in each epoch, or the training order."""

    @property
    def key(self) -> tuple[int, ...]:
        return (self.seed, self.rounds_seen)

    def problems(self) -> list[str]:
        """Problems of the values, by the names of the flags."""
        return list(wrong_fields(self))


@dataclass
class Groups:
    """The losses of a recording as group losses, in chunks.

    A group's loss is the mean over its tokens, like the loss of a batch, or over its samples if the numbers
    of tokens are unknown; the last group may be smaller.
    """

    source: Losses
    size: int

    def __len__(self) -> int:
        return -(-len(self.source.losses) // self.size)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The first sample of each chunk and of the next chunk."""
        step, samples = drawing.CHUNK * self.size, len(self.source.losses)
        for begin in range(0, samples, step):
            yield begin, min(begin + step, samples)

    def losses(self) -> Iterator[np.ndarray]:
        """Group losses of each chunk, float64."""
        for begin, end in self.spans():
            values = np.asarray(self.source.losses[begin:end], dtype=np.float64)
            if self.size == 1:
                yield values
                continue
            weights = np.ones(len(values))
            if self.source.tokens is not None:
                weights = np.asarray(self.source.tokens[begin:end], dtype=np.float64)
            starts = np.arange(0, len(values), self.size)
            totals = np.add.reduceat(weights, starts)
            yield np.add.reduceat(values * weights, starts) / np.maximum(totals, 1)


@dataclass
class Report:
    """What was kept and dropped: counts of groups in the histogram, and of samples by source."""

    edges: np.ndarray  # [bins + 1] group losses
    groups: np.ndarray  # int [bins]
    kept: np.ndarray  # int [bins]
    expected: np.ndarray  # float [bins], expected number of selected groups
    source_names: list[str]
    source_before: np.ndarray  # int [sources]
    source_after: np.ndarray  # int [sources]
    source_expected: np.ndarray  # float [sources]

    def as_json(self) -> dict[str, Any]:
        histogram = {name: getattr(self, name).tolist() for name in ("edges", "groups", "kept", "expected")}
        before, after = self.source_before, self.source_after
        return {
            "histogram": histogram,
            "sources": [
                {
                    "name": name,
                    "samples": int(before[i]),
                    "share_before": float(before[i] / before.sum()),
                    "share_after": float(after[i] / after.sum()),
                    "expected": float(self.source_expected[i]),
                    "drawn": int(after[i]),
                }
                for i, name in enumerate(self.source_names)
            ],
        }


def build_round(
    losses_path: str | Path,
    options: RoundOptions,
    output: str | Path,
    show_progress: bool = False,
) -> tuple[dict[str, Any], Report]:
    """Select a round, and write its index and manifest; returns the manifest and the report.

    Raises:
        DatasetError: the losses are incomplete, have NaN or Inf, or do not allow this selection.
        ValueError: the losses would be overwritten, or changed while they were read.
    """
    files, paths = vars(record_paths(losses_path)).values(), round_paths(output)
    refuse_overwriting(vars(paths).values(), files)
    refuse_replacing(paths.manifest, FORMAT)
    with unchanged(files) as watch:
        return _build(read_losses(losses_path), options, paths, watch, show_progress)


def _build(
    source: Losses, options: RoundOptions, paths: RoundPaths, watch: Watch, show_progress: bool
) -> tuple[dict[str, Any], Report]:
    groups = Groups(source, options.group_size)
    names = source.source_names or ["all"]
    sources = source.sources
    if options.per_source and (sources is None or options.group_size > 1):
        why = "groups mix sources: leave --group-size at 1" if sources is not None else "there is one source"
        raise DatasetError(f"--per-source: {why} ({source.path})")
    check_finite(source)
    stratum_of, counts = _strata(source, groups, options)

    # The losses are read once to count them, twice to find the threshold and once to write.
    progress = Progress("drawing a round", 4 * len(source.losses), " losses", quiet=not show_progress)

    def chunks() -> Iterator[drawing.Chunk]:
        for (begin, end), losses in zip(groups.spans(), groups.losses(), strict=True):
            strata = None if stratum_of is None or sources is None else stratum_of[sources[begin:end]]
            yield losses / options.temperature, strata
            progress.add(end - begin)

    report = _empty_report(*_range(groups), names)
    with progress:
        levels = _expected_levels(chunks, counts, report.edges / options.temperature)
        limits = drawing.thresholds(chunks, counts, options.key)
        paths.index.parent.mkdir(parents=True, exist_ok=True)
        paths.manifest.unlink(missing_ok=True)  # there is none until the new index is complete
        drawn = drawing.draw(chunks, limits, options.key)
        selected, sha256 = _write_index(paths.index, _ids(drawn, levels, groups, options, report), watch)
    manifest = _manifest(source, options, selected, sha256, len(groups), sum(counts), report)
    write_json(paths.manifest, manifest)
    return manifest, report


def check_finite(source: Losses) -> None:
    """Raise for losses that are NaN or Inf.

    Raises:
        DatasetError: with their number, and the first samples that have one.
    """
    named: list[int] = []
    bad = 0
    for begin in range(0, len(source.losses), drawing.CHUNK):
        values = source.losses[begin : begin + drawing.CHUNK]
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            places = np.flatnonzero(~np.isfinite(values))
            bad += len(places)
            named += (places[: NAMED - len(named)] + begin).tolist()
    if bad:
        more = ", ..." if bad > len(named) else ""
        raise DatasetError(
            f"{source.path}: {bad:,} of {len(source.losses):,} losses are NaN or Inf, those of samples "
            f"{', '.join(map(str, named))}{more}: the model or these samples are broken; record with a sound "
            "checkpoint"
        )


def _strata(source: Losses, groups: Groups, options: RoundOptions) -> tuple[np.ndarray | None, list[int]]:
    """Stratum of each source (None: one for all), and the number of groups to select per stratum."""

    def count(population: int) -> int:
        return max(1, round(options.rate * population))

    if not options.per_source or source.sources is None:
        return None, [count(len(groups))]
    held = np.bincount(source.sources, minlength=len(source.source_names))
    present = np.flatnonzero(held)
    stratum_of = np.zeros(len(held), dtype=np.int64)
    stratum_of[present] = np.arange(len(present))
    return stratum_of, [count(int(held[i])) for i in present]


def _range(groups: Groups) -> tuple[float, float]:
    """Smallest and largest group loss."""
    ends = [(losses.min(), losses.max()) for losses in groups.losses()]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def _expected_levels(
    chunks: Callable[[], Iterator[drawing.Chunk]], counts: list[int], edges: np.ndarray
) -> np.ndarray:
    """For each stratum, the level above which ``counts[stratum]`` noisy scores are expected."""
    low, width = edges[0], (edges[-1] - edges[0]) / FINE_BINS
    numbers = np.zeros(len(counts) * FINE_BINS, dtype=np.int64)
    for scores, strata in chunks():
        bins = ((scores - low) / width).astype(np.int64).clip(0, FINE_BINS - 1)
        if strata is not None:
            bins += strata * FINE_BINS
        numbers += np.bincount(bins, minlength=len(numbers))
    centers = low + (np.arange(FINE_BINS) + 0.5) * width
    parts = zip(numbers.reshape(-1, FINE_BINS), counts, strict=True)
    return np.array([drawing.expected_level(centers, part, count) for part, count in parts])


def _empty_report(low: float, high: float, names: list[str]) -> Report:
    def zeros(length: int, dtype: type = np.int64) -> np.ndarray:
        return np.zeros(length, dtype=dtype)

    edges = np.linspace(low, high if high > low else low + 1, HISTOGRAM_BINS + 1)
    bins, sources = HISTOGRAM_BINS, len(names)
    return Report(
        edges, zeros(bins), zeros(bins), zeros(bins, np.float64),
        names, zeros(sources), zeros(sources), zeros(sources, np.float64),
    )  # fmt: skip


def _ids(
    drawn: Iterator[drawing.Drawn], levels: np.ndarray, groups: Groups, options: RoundOptions, report: Report
) -> Iterator[np.ndarray]:
    """Sample numbers of each chunk's selected groups, ascending; also completes the report."""
    low, width = report.edges[0], report.edges[1] - report.edges[0]
    for (begin, end), (scores, strata, is_drawn) in zip(groups.spans(), drawn, strict=True):
        chance = drawing.chance_above(levels[0] if strata is None else levels[strata], scores)
        bins = ((scores * options.temperature - low) / width).astype(np.int64).clip(0, HISTOGRAM_BINS - 1)
        report.groups += np.bincount(bins, minlength=HISTOGRAM_BINS)
        report.kept += np.bincount(bins[is_drawn], minlength=HISTOGRAM_BINS)
        report.expected += np.bincount(bins, chance, minlength=HISTOGRAM_BINS)
        if groups.size > 1:
            is_drawn = np.repeat(is_drawn, groups.size)[: end - begin]
            chance = np.repeat(chance, groups.size)[: end - begin]
        places = np.flatnonzero(is_drawn)
        if groups.source.sources is None:
            report.source_before += end - begin
            report.source_after += len(places)
            report.source_expected += chance.sum()
        else:
            sources, number = groups.source.sources[begin:end], len(report.source_names)
            report.source_before += np.bincount(sources, minlength=number)
            report.source_after += np.bincount(sources[places], minlength=number)
            report.source_expected += np.bincount(sources, chance, minlength=number)
        yield places + begin


def _write_index(path: Path, ids: Iterator[np.ndarray], watch: Watch) -> tuple[int, str]:
    """Write an int64 .npy of all ids; returns their number and the sha256 of their bytes.

    ``watch``: the input files, which must be unchanged when the index is published.
    """
    count, digest = 0, hashlib.sha256()

    def header(file: BinaryIO) -> None:
        # NumPy pads the header for any length, so it can be rewritten at the end.
        fields = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, fields)

    def write(file: BinaryIO) -> None:
        nonlocal count
        header(file)
        begin = file.tell()
        for part in ids:
            data = np.ascontiguousarray(part, dtype="<i8").data
            digest.update(data)
            file.write(data)
            count += len(part)
        watch.check()
        file.seek(0)
        header(file)
        assert file.tell() == begin

    write_aside(path, write)
    return count, digest.hexdigest()


def _manifest(
    source: Losses,
    options: RoundOptions,
    selected: int,
    sha256: str,
    num_groups: int,
    drawn: int,
    report: Report,
) -> dict[str, Any]:
    losses: dict[str, Any] = {"file": source.path.name, "kind": "plain"}
    if source.manifest is not None:
        names = ("kind", "model", "tokens", "mean_loss")
        losses |= {name: source.manifest.get(name) for name in names}
    return {
        "format": FORMAT,
        "round": options.rounds_seen + 1,
        "samples": len(source.losses),
        "selected": selected,
        "sha256": sha256,
        "groups": num_groups,
        "groups_drawn": drawn,
        **vars(options),
        "dataset": source.manifest["dataset"] if source.manifest else None,
        "losses": losses,
        "report": report.as_json(),
    }

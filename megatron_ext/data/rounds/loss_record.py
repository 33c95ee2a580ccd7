"""One loss for each sample of a training set, in files that NumPy maps into memory.

    LOSSES.npy           float32 [samples]: mean loss of the sample's tokens, nats
    LOSSES.tokens.npy    int32 [samples]: tokens that count in it; -1 where nothing is recorded yet
    LOSSES.sources.npy   int16 [samples]: which source of a blend the sample is of (blends only)
    LOSSES.json          the manifest: of which training set and model, how many are recorded

A sample's place is its number in the training set of the run: its place in training order with
``--dataloader-type single``. The manifest is replaced after the losses it counts are on the disk,
so that a recording that was killed goes on where its manifest says.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.common.files import sha256_file, write_aside, write_json
from megatron_ext.data.indexed import DatasetError

FORMAT = "megatron_ext.sample_losses/1"
#: Seconds between two markers of a recording.
MARK_EVERY_S = 5.0
_BLOCK = 1 << 24


@dataclass(frozen=True)
class RecordPaths:
    """The files of a recording, by any of the spellings LOSSES and LOSSES.npy."""

    losses: Path
    tokens: Path
    sources: Path
    manifest: Path

    def checksums(self) -> dict[str, str]:
        """sha256 of the files of numbers that are there, by the names they have here."""
        named = {"losses": self.losses, "tokens": self.tokens, "sources": self.sources}
        return {name: sha256_file(path) for name, path in named.items() if path.exists()}


def record_paths(path: str | Path) -> RecordPaths:
    """The files that belong to ``path``."""
    stem = str(path).removesuffix(".npy")
    return RecordPaths(*(Path(f"{stem}{end}") for end in (".npy", ".tokens.npy", ".sources.npy", ".json")))


class LossRecord:
    """A recording that is being written, by one process.

    ``recorded`` is the number of samples whose losses were on the disk when it was opened; a frozen
    model is recorded in the order of the samples, so that these are the first ones.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any]) -> None:
        self.paths = record_paths(path)
        self.manifest = manifest
        self.samples: int = manifest["samples"]
        self.recorded: int = manifest["recorded"]
        self.losses = np.load(self.paths.losses, mmap_mode="r+")
        self.tokens = np.load(self.paths.tokens, mmap_mode="r+")
        self._marked = time.monotonic()

    def write(self, ids: np.ndarray, losses: np.ndarray, tokens: np.ndarray) -> None:
        """Note losses (float) and token counts (int) of samples; numbers past the last are padding."""
        real = ids < self.samples
        ids = ids[real]
        if self.manifest.pop("sha256", None) is not None:  # a complete recording that is written to again
            write_record_manifest(self.paths.manifest, self.manifest)
        self.losses[ids] = losses[real]
        self.tokens[ids] = tokens[real]

    def mark(self, recorded: int | None = None, force: bool = False) -> None:
        """Make what was written count: to the disk, then into the manifest; at most every 5 seconds.

        ``recorded`` samples count from then on; by default those that have a loss are counted.
        """
        if not force and time.monotonic() - self._marked < MARK_EVERY_S:
            return
        self.losses.flush()
        self.tokens.flush()
        self.recorded = count_recorded(self.tokens) if recorded is None else min(recorded, self.samples)
        self.manifest["recorded"] = self.recorded
        self.manifest["complete"] = self.recorded == self.samples
        if self.manifest["complete"]:
            self.manifest |= summarize(self.losses, self.tokens) | {"sha256": self.paths.checksums()}
        write_record_manifest(self.paths.manifest, self.manifest)
        self._marked = time.monotonic()


def count_recorded(tokens: np.ndarray) -> int:
    """How many samples have a loss."""
    return sum(int((tokens[i : i + _BLOCK] >= 0).sum()) for i in range(0, len(tokens), _BLOCK))


def summarize(losses: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Tokens, mean loss per token (nats) over the finite losses, and the number of those that are not."""
    total, counted, bad = 0.0, 0, 0
    for start in range(0, len(losses), _BLOCK):
        values = losses[start : start + _BLOCK].astype(np.float64)
        weights = tokens[start : start + _BLOCK].astype(np.int64)
        finite = np.isfinite(values)
        bad += int((~finite).sum())
        total += float((values * weights)[finite].sum())
        counted += int(weights[finite].sum())
    return {"tokens": counted, "mean_loss": total / counted if counted else None, "not_finite": bad}


def open_record(path: str | Path, manifest: dict[str, Any], sources: np.ndarray | None) -> dict[str, Any]:
    """Begin a recording, or find the one that is there and is the same; returns its manifest.

    Args:
        path: LOSSES or LOSSES.npy.
        manifest: ``kind`` ("frozen" or "online"), ``samples``, ``dataset`` (of identify) and
            ``model``; what must agree for a recording to be gone on with.
        sources: int16 [samples], the source of each sample, or None for a single dataset.

    Raises:
        DatasetError: other losses lie there.
    """
    paths = record_paths(path)
    if paths.manifest.exists():
        found = read_record_manifest(paths.manifest)
        _require_same_recording(found, manifest, paths)
        if paths.losses.exists() and paths.tokens.exists():
            return found
        if found["recorded"]:
            raise DatasetError(f"{paths.losses} or {paths.tokens.name} is missing; remove {paths.manifest}")
    elif paths.losses.exists():
        raise DatasetError(f"{paths.losses} is there and has no manifest: remove it, or give another path")
    paths.losses.parent.mkdir(parents=True, exist_ok=True)
    manifest = {"format": FORMAT} | manifest | {"recorded": 0, "complete": False}
    write_record_manifest(paths.manifest, manifest)
    samples = manifest["samples"]
    if sources is not None:
        _create(paths.sources, np.int16, samples, lambda begin, end: sources[begin:end])
    _create(paths.tokens, np.int32, samples, lambda begin, end: np.full(end - begin, -1, np.int32))
    _create(paths.losses, np.float32, samples, lambda begin, end: np.zeros(end - begin, np.float32))
    return manifest


def _create(
    path: Path, dtype: type[np.generic], samples: int, values: Callable[[int, int], np.ndarray]
) -> None:
    """Write an .npy file of ``samples`` numbers, ``values(begin, end)`` at a time."""

    def write(file: BinaryIO) -> None:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for begin in range(0, samples, _BLOCK):
            end = min(begin + _BLOCK, samples)
            file.write(np.ascontiguousarray(values(begin, end), dtype=dtype).data)

    write_aside(path, write)


def _require_same_recording(found: dict[str, Any], wanted: dict[str, Any], paths: RecordPaths) -> None:
    from megatron_ext.data.identity import require_same

    if found["kind"] != wanted["kind"]:
        raise DatasetError(
            f"{paths.losses} holds {found['kind']} losses, not {wanted['kind']} ones: remove it and "
            f"{paths.manifest.name}, or give another path"
        )
    advice = f"Remove it and {paths.manifest.name}, or give another --record-sample-loss"
    require_same(found["dataset"], wanted["dataset"], str(paths.losses), advice)
    if found["model"] != wanted["model"]:
        differing = sorted(
            name
            for name in found["model"].keys() | wanted["model"].keys()
            if found["model"].get(name) != wanted["model"].get(name)
        )
        raise DatasetError(
            f"{paths.losses} was begun with another model or other options ({', '.join(differing)}). {advice}"
        )


def write_record_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    write_json(path, manifest)


def read_record_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a recording.

    Raises:
        DatasetError: the file is something else.
    """
    return read_json(path, FORMAT, ("kind", "samples", "recorded", "complete", "dataset", "model"))


def read_json(path: Path, expected_format: str, names: tuple[str, ...]) -> dict[str, Any]:
    """A manifest of the format, with at least these fields, ``samples`` among them.

    Raises:
        DatasetError: it cannot be read, or is something else.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != expected_format:
            raise ValueError(f"its format is {manifest['format']!r}, not {expected_format!r}")
        missing = [name for name in names if name not in manifest]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if type(manifest["samples"]) is not int or manifest["samples"] < 1:
            raise ValueError(f"its number of samples is {manifest['samples']!r}")
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest of {expected_format} ({error})") from error
    return manifest


@dataclass(frozen=True)
class Losses:
    """Losses to read; arrays are mapped into memory. A plain .npy has no more than its losses."""

    path: Path
    losses: np.ndarray  # float32 [samples]
    tokens: np.ndarray | None  # int32 [samples]
    sources: np.ndarray | None  # int16 [samples]
    manifest: dict[str, Any] | None

    @property
    def source_names(self) -> list[str]:
        return self.manifest["dataset"]["sources"] if self.manifest else []


def read_losses(path: str | Path, allow_incomplete: bool = False) -> Losses:
    """Map a recording, or a plain .npy of floats, into memory.

    Raises:
        DatasetError: it is not there, damaged, of another form, or not complete.
    """
    paths = record_paths(path)
    losses = map_array(paths.losses, np.floating)
    if not paths.manifest.exists():
        return Losses(paths.losses, losses, None, None, None)
    manifest = read_record_manifest(paths.manifest)
    if not manifest["complete"] and not allow_incomplete:
        raise DatasetError(
            f"{paths.losses}: the recording is not complete, {manifest['recorded']:,} of "
            f"{manifest['samples']:,} samples; start the command that records again and it goes on"
        )
    tokens = map_array(paths.tokens, np.int32)
    sources = map_array(paths.sources, np.int16) if len(manifest["dataset"]["sources"]) > 1 else None
    for array, file in ((losses, paths.losses), (tokens, paths.tokens), (sources, paths.sources)):
        if array is not None and len(array) != manifest["samples"]:
            raise DatasetError(
                f"{file}: holds {len(array):,} samples, but {paths.manifest.name} says "
                f"{manifest['samples']:,}"
            )
    _check_checksums(paths, manifest)
    return Losses(paths.losses, losses, tokens, sources, manifest)


def _check_checksums(paths: RecordPaths, manifest: dict[str, Any]) -> None:
    told = manifest.get("sha256")  # a recording of an earlier version, or an incomplete one, has none
    if told is None:
        return
    for name, found in paths.checksums().items():
        if told.get(name) != found:
            raise DatasetError(
                f"{getattr(paths, name)}: was altered since it was recorded (its sha256 is not that of "
                f"{paths.manifest.name}); copy it again, or record again"
            )


def map_array(path: Path, kind: type[np.generic]) -> np.ndarray:
    """An .npy file of one axis, mapped into memory.

    Raises:
        DatasetError: it is not there, cut off, or holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise DatasetError(f"{path}: cannot be read as an .npy file ({reason})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not np.issubdtype(array.dtype, kind):
        raise DatasetError(f"{path}: must be an .npy file of one axis of {kind.__name__}")
    if len(array) == 0:
        raise DatasetError(f"{path}: is empty")
    return array

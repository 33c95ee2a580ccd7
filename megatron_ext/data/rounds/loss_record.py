"""One loss for each sample of a training set, in files that NumPy maps into memory.

    LOSSES.npy           float32 [samples]: mean loss of the sample's tokens, nats
    LOSSES.tokens.npy    int32 [samples]: number of tokens in the loss; -1 if not recorded yet
    LOSSES.sources.npy   int16 [samples]: the sample's source in a blend (only for blends)
    LOSSES.json          the manifest: the training set, the model, and how many are recorded

The index of a sample is its number in the training set of the run, that is, the training order with
``--dataloader-type single``. The manifest is replaced after the losses that it counts are on disk, so that
a killed recording resumes at the position in its manifest.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.common.files import sha256_file, write_aside, write_json
from megatron_ext.data.indexed import DatasetError

FORMAT = "megatron_ext.sample_losses/1"
#: Seconds between two updates of a recording's manifest.
MARK_EVERY_S = 5.0
_BLOCK = 1 << 24


@dataclass(frozen=True)
class RecordPaths:
    """The files of a recording, named LOSSES or LOSSES.npy."""

    losses: Path
    tokens: Path
    sources: Path
    manifest: Path

    def checksums(self) -> dict[str, str]:
        """sha256 of the existing array files, by field name."""
        named = {"losses": self.losses, "tokens": self.tokens, "sources": self.sources}
        return {name: sha256_file(path) for name, path in named.items() if path.exists()}


def record_paths(path: str | Path) -> RecordPaths:
    """The files that belong to ``path``."""
    stem = str(path).removesuffix(".npy")
    return RecordPaths(*(Path(f"{stem}{end}") for end in (".npy", ".tokens.npy", ".sources.npy", ".json")))


class LossRecord:
    """A recording that is being written, by one process.

    ``recorded`` is the number of samples whose losses were on disk when it was opened; a frozen model is
    recorded in the order of the samples, so these are the first ones.
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
        """Write losses (float) and token counts (int) of samples; ids beyond the last sample are padding."""
        real = ids < self.samples
        ids = ids[real]
        if self.manifest.pop("sha256", None) is not None:  # a complete recording is written to again
            write_record_manifest(self.paths.manifest, self.manifest)
        self.losses[ids] = losses[real]
        self.tokens[ids] = tokens[real]

    def mark(self, recorded: int | None = None, force: bool = False) -> None:
        """Flush to disk, then update the manifest; at most every 5 seconds unless ``force``.

        ``recorded`` is the new number of recorded samples; by default the samples with a loss are counted.
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
    """Number of samples with a loss."""
    return sum(int((tokens[i : i + _BLOCK] >= 0).sum()) for i in range(0, len(tokens), _BLOCK))


def summarize(losses: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Number of tokens, mean finite loss per token (nats), and number of losses that are not finite."""
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
    """Create a recording, or open an existing one of the same kind; returns its manifest.

    Args:
        path: LOSSES or LOSSES.npy.
        manifest: ``kind`` ("frozen" or "online"), ``samples``, ``dataset`` (of identify) and
            ``model``; they must be equal to resume a recording.
        sources: int16 [samples], the source of each sample, or None for a single dataset.

    Raises:
        DatasetError: the files hold other losses.
    """
    paths = record_paths(path)

    def existing() -> dict[str, Any]:
        found = read_record_manifest(paths.manifest)
        _require_same_recording(found, manifest, paths)
        return found

    if (goes_on := begun(paths.manifest, (paths.losses, paths.tokens), existing)) is not None:
        return goes_on
    manifest = {"format": FORMAT} | manifest | {"recorded": 0, "complete": False}
    write_record_manifest(paths.manifest, manifest)
    samples = manifest["samples"]
    if sources is not None:
        _create(paths.sources, np.int16, samples, lambda begin, end: sources[begin:end])
    _create(paths.tokens, np.int32, samples, lambda begin, end: np.full(end - begin, -1, np.int32))
    _create(paths.losses, np.float32, samples, lambda begin, end: np.zeros(end - begin, np.float32))
    return manifest


def begun(
    manifest: Path, files: Sequence[Path], existing: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """The manifest of a recording that goes on; None, and a folder for it, where one is to be begun.

    ``existing`` reads the manifest that is there, and refuses one of another recording.

    Raises:
        DatasetError: some of the ``files`` are missing, or are there without a manifest.
    """
    if manifest.exists():
        found = existing()
        if all(file.exists() for file in files):
            return found
        if found["recorded"]:
            names = " or ".join([str(files[0]), *(file.name for file in files[1:])])
            raise DatasetError(f"{names} is missing; remove {manifest}")
    elif files[0].exists():
        raise DatasetError(f"{files[0]} is there and has no manifest: remove it, or give another path")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    return None


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


def _require_same_recording(existing: dict[str, Any], wanted: dict[str, Any], paths: RecordPaths) -> None:
    from megatron_ext.data.identity import require_same

    if existing["kind"] != wanted["kind"]:
        raise DatasetError(
            f"{paths.losses} holds {existing['kind']} losses, not {wanted['kind']} ones: remove it and "
            f"{paths.manifest.name}, or give another path"
        )
    advice = f"Remove it and {paths.manifest.name}, or give another --record-sample-loss"
    require_same(existing["dataset"], wanted["dataset"], str(paths.losses), advice)
    if existing["model"] != wanted["model"]:
        differing = sorted(
            name
            for name in existing["model"].keys() | wanted["model"].keys()
            if existing["model"].get(name) != wanted["model"].get(name)
        )
        raise DatasetError(
            f"{paths.losses} was begun with another model or other options ({', '.join(differing)}). {advice}"
        )


def write_record_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest atomically."""
    write_json(path, manifest)


def read_record_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a recording.

    Raises:
        DatasetError: the file is of another format.
    """
    return read_json(path, FORMAT, ("kind", "samples", "recorded", "complete", "dataset", "model"))


def read_json(path: Path, expected_format: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Read a manifest of this format with at least these fields, including ``samples``.

    Raises:
        DatasetError: it cannot be read, or is of another format.
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
    """Losses as arrays that are mapped into memory. A plain .npy has only losses."""

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
        DatasetError: it is missing, damaged, of another format, or incomplete.
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
    expected = manifest.get("sha256")  # missing in incomplete recordings and those of earlier versions
    if expected is None:
        return
    for name, actual in paths.checksums().items():
        if expected.get(name) != actual:
            raise DatasetError(
                f"{getattr(paths, name)}: was altered since it was recorded (its sha256 is not that of "
                f"{paths.manifest.name}); copy it again, or record again"
            )


def map_array(path: Path, kind: type[np.generic]) -> np.ndarray:
    """Map a one-dimensional .npy file into memory.

    Raises:
        DatasetError: it is missing, truncated, or of another type.
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

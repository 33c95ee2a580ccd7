"""The distributions that a teacher predicts for each token of a training set, in a file mapped into memory.

    TARGETS.npy     a record for each sample: for each of its tokens the k most likely ids, their
                    log-probabilities, and the probability of all other ids together
    TARGETS.json    the manifest: the training set, the teacher, and how many samples are recorded

The number of a sample is its place in the training set of the run, as in a record of losses
(:mod:`megatron_ext.data.rounds.loss_record`). A record ends with its CRC-32, which is checked whenever it is
read: a file of terabytes is never read for its checksum alone. The manifest is replaced after the records
that it counts are on disk, so that a killed recording goes on at the place in its manifest.
"""

from __future__ import annotations

import os
import time
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ext.common.files import write_aside, write_json
from megatron_ext.data.identity import differences
from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds.dataset import NumberedDataset
from megatron_ext.data.rounds.loss_record import MARK_EVERY_S, begun, read_json

FORMAT = "megatron_ext.teacher_targets/1"
#: Stands for the other ids' probability at a token without a target.
_NO_TARGET = -1.0


@dataclass(frozen=True)
class TargetFormat:
    """What a record holds.

    Attributes:
        seq_length: tokens of a sample, s.
        top_k: ids of a token, k.
        vocab_size: of the student; up to 65,536 an id takes 2 bytes, else 4.
        dtype: number format of log-probabilities, "fp16" or "fp32".
    """

    seq_length: int
    top_k: int
    vocab_size: int
    dtype: str = "fp16"

    @cached_property
    def record(self) -> np.dtype:
        """A sample's record."""
        shape, ids = (self.seq_length, self.top_k), "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        logprobs = {"fp16": "<f2", "fp32": "<f4"}[self.dtype]
        return np.dtype(
            [("ids", ids, shape), ("logprobs", logprobs, shape), ("rest", "<f4", shape[:1]), ("crc", "<u4")]
        )

    @property
    def bytes_per_token(self) -> float:
        """Of the file."""
        return self.record.itemsize / self.seq_length


class Targets(NamedTuple):
    """Targets of the tokens of samples, in PyTorch's types that hold them; n samples of s tokens.

    Attributes:
        ids: int32 [n, s, k], distinct, the most likely first; -1 where there are fewer.
        logprobs: [n, s, k], natural logarithms; -inf where there is no id.
        rest: float32 [n, s], the probability of all other ids; negative where the token has no target.
    """

    ids: Tensor
    logprobs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, ids: Tensor, logprobs: Tensor, rest: Tensor, mask: Tensor | None) -> Targets:
        """With ``mask``, bool [n, s]: the tokens that have a target; None for all."""
        if mask is not None:
            rest = rest.masked_fill(~mask, _NO_TARGET)
            ids, logprobs = (
                ids.masked_fill(~mask[..., None], -1),
                logprobs.masked_fill(~mask[..., None], -torch.inf),
            )
        return cls(ids.int(), logprobs, rest.float())


def packed(targets: Targets, like: TargetFormat) -> np.ndarray:
    """The records of samples, [n]."""
    records = np.zeros(len(targets.ids), dtype=like.record)
    records["ids"] = targets.ids.clamp(min=0).cpu().numpy()
    records["logprobs"] = targets.logprobs.cpu().float().numpy()
    records["rest"] = targets.rest.cpu().numpy()
    for record in records:
        record["crc"] = _checksum(record)
    return records


def _checksum(record: np.void) -> int:
    return zlib.crc32(memoryview(record.tobytes())[:-4])


@dataclass(frozen=True)
class TargetPaths:
    """The files of a store, named TARGETS or TARGETS.npy."""

    records: Path
    manifest: Path

    @classmethod
    def of(cls, path: str | Path) -> TargetPaths:
        """The files that belong to ``path``."""
        stem = str(path).removesuffix(".npy")
        return cls(Path(f"{stem}.npy"), Path(f"{stem}.json"))


def open_recording(path: str | Path, manifest: dict[str, Any], like: TargetFormat) -> dict[str, Any]:
    """Create a store, or open one that was begun for the same; returns its manifest.

    Args:
        manifest: ``samples``, ``dataset`` (of ``identify``, with its probe), ``teacher``, ``reading`` (what
            else changes how samples are read) and ``temperature``.

    Raises:
        DatasetError: the files hold other targets; the message names what differs.
    """
    paths = TargetPaths.of(path)
    wanted = {"format": FORMAT} | manifest | {"targets": asdict(like)}

    def existing() -> dict[str, Any]:
        found = _read_manifest(paths.manifest)
        advice = f"Remove it and {paths.manifest.name}, or give another --record-teacher-logits"
        require_same_targets(found, wanted, str(paths.records), advice)
        return found

    if (goes_on := begun(paths.manifest, (paths.records,), existing)) is not None:
        _mapped(paths.records, goes_on)
        return goes_on
    wanted |= {"bytes_per_token": like.bytes_per_token, "recorded": 0, "complete": False}
    write_json(paths.manifest, wanted)
    write_aside(paths.records, lambda file: _reserve(file, like.record, manifest["samples"]))
    return wanted


def _reserve(file: BinaryIO, record: np.dtype, samples: int) -> None:
    """An .npy file of that length, of which nothing is on disk yet."""
    descr = np.lib.format.dtype_to_descr(record)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (samples,)})
    file.truncate(file.tell() + samples * record.itemsize)


def require_same_targets(theirs: dict[str, Any], ours: dict[str, Any], of: str, advice: str) -> None:
    """Raise DatasetError, naming the differences, unless two manifests describe the same targets.

    Compared is what ``ours`` has of ``dataset``, ``targets``, ``teacher``, ``reading`` and ``temperature``.
    """
    wrong = []
    if "dataset" in ours:
        wrong += differences(theirs["dataset"], ours["dataset"])
    for part in ("targets", "teacher", "reading"):
        wrong += [
            f"{_SAID.get((part, name), name)}: {theirs[part].get(name)} there, {value} here"
            for name, value in ours.get(part, {}).items()
            if theirs[part].get(name) != value
        ]
    if theirs["temperature"] != ours.get("temperature", theirs["temperature"]):
        wrong.append(f"--distillation-temperature: {theirs['temperature']} there, {ours['temperature']} here")
    if wrong:
        raise DatasetError(f"{of} holds other targets: {'; '.join(wrong)}. {advice}")


#: (part, field) of a manifest -> what it is, or the flag that sets it.
_SAID = {
    ("targets", "seq_length"): "--seq-length",
    ("targets", "top_k"): "--distillation-top-k",
    ("targets", "vocab_size"): "size of the student's vocabulary",
    ("targets", "dtype"): "--teacher-logits-dtype",
    ("teacher", "sha256"): "the teacher's weights",
    ("teacher", "tokenizer_sha256"): "the teacher's tokenizer",
    ("reading", "reset_position_ids"): "--reset-position-ids",
    ("reading", "reset_attention_mask"): "--reset-attention-mask",
}


class TargetWriter:
    """Writes a recording, from one process; ``recorded`` samples were on disk when it was opened."""

    def __init__(self, path: str | Path, manifest: dict[str, Any]) -> None:
        self.paths, self.manifest = TargetPaths.of(path), manifest
        self.samples: int = manifest["samples"]
        self.record = TargetFormat(**manifest["targets"]).record
        # Not through a map: on a full disk a write to one would end the process.
        self.file = open(self.paths.records, "r+b")
        self.begin = os.fstat(self.file.fileno()).st_size - self.samples * self.record.itemsize
        self._marked = time.monotonic()

    def write(self, numbers: np.ndarray, records: np.ndarray) -> None:
        """Write the records of samples; numbers beyond the last sample are padding."""
        for number, record in zip(numbers.tolist(), records, strict=True):
            if number < self.samples:
                self.file.seek(self.begin + number * self.record.itemsize)
                self.file.write(record.tobytes())

    def mark(self, recorded: int, force: bool = False) -> None:
        """Note that the first ``recorded`` samples are on disk; at most every 5 seconds unless ``force``."""
        if not force and time.monotonic() - self._marked < MARK_EVERY_S:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.manifest |= {"recorded": recorded, "complete": recorded == self.samples}
        write_json(self.paths.manifest, self.manifest)
        self._marked = time.monotonic()


class TargetStore:
    """The targets of a training set's samples, by their numbers."""

    def __init__(self, path: Path, manifest: dict[str, Any], records: np.ndarray) -> None:
        self.path, self.manifest, self.records = path, manifest, records
        self.format = TargetFormat(**manifest["targets"])

    @classmethod
    def open(cls, path: str | Path) -> TargetStore:
        """Map a complete recording into memory.

        Raises:
            DatasetError: it is missing, damaged, of another format, or incomplete.
        """
        paths = TargetPaths.of(path)
        manifest = _read_manifest(paths.manifest)
        if not manifest["complete"]:
            raise DatasetError(
                f"{paths.records}: the recording is not complete, {manifest['recorded']:,} of "
                f"{manifest['samples']:,} samples; start the command that records again and it goes on"
            )
        return cls(paths.records, manifest, _mapped(paths.records, manifest))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Targets:
        """The targets of a sample, without an axis of samples.

        Raises:
            DatasetError: the record is damaged.
        """
        record = self.records[number]
        if _checksum(record) != record["crc"]:
            raise DatasetError(
                f"{self.path}: the record of sample {number:,} is damaged (its checksum is another); copy "
                "the file again, or record again"
            )
        ids = torch.from_numpy(record["ids"].astype(np.int32))
        logprobs = torch.from_numpy(record["logprobs"].copy())
        return Targets(
            ids.masked_fill_(logprobs == -torch.inf, -1), logprobs, torch.from_numpy(record["rest"].copy())
        )


class TaughtSamples(NumberedDataset):
    """Numbered samples, each with its targets as ``teacher_ids`` and so on."""

    def __init__(self, dataset: NumberedDataset, store: TargetStore) -> None:
        super().__init__(dataset)
        self.store = store

    def __getitem__(self, place: int) -> dict[str, Any]:
        sample = self.dataset[place]
        targets = self.store[sample["sample_id"]]
        return {**sample, **{f"teacher_{name}": value for name, value in targets._asdict().items()}}


def _read_manifest(path: Path) -> dict[str, Any]:
    names = ("samples", "recorded", "complete", "dataset", "teacher", "reading", "temperature", "targets")
    return read_json(path, FORMAT, names)


def _mapped(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    """The records, one a sample.

    Raises:
        DatasetError: the file is missing, cut short, or not what the manifest says.
    """
    try:
        records = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise DatasetError(f"{path}: cannot be read as an .npy file ({reason})") from error
    if records.shape != (manifest["samples"],) or records.dtype != TargetFormat(**manifest["targets"]).record:
        raise DatasetError(f"{path}: does not hold what its manifest says; copy both again, or record again")
    return records

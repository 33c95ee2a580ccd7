"""Knows a complete, unaltered checkpoint from a torn or altered one.

Each checkpoint of ours holds ``checksums.json``, written last: size and SHA-256 of every other
file. Checkpoints made by Megatron-LM have none; of those it is checked that every file is there
and as long as the metadata says.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.errors import DamagedCheckpoint
from megatron_ext.checkpoint.safe import load_metadata, load_object
from megatron_ext.common.files import sha256, sha256_file

CHECKSUMS = "checksums.json"
#: A run of 100,000 files would need less for their checksums.
_LARGEST_LIST = 1 << 25
#: Bytes hashed and handed to the system at a time: they are still in the processor's cache then.
_CHUNK = 1 << 20
#: Bytes after which the disk is set to work, so that it does not wait for the last one.
_SYNC_BYTES = 1 << 26


class HashingStream:
    """A file being written, and the SHA-256 of what went into it."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=1 << 16)  # noqa: SIM115 (closed by close)
        self._hash = hashlib.sha256()
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: Future[None] | None = None
        self._synced_until = 0
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._hash.update(chunk)
            self._file.write(chunk)
            self.size += chunk.nbytes
            if self.size - self._synced_until >= _SYNC_BYTES:
                self._sync_behind()
        return view.nbytes

    def _sync_behind(self) -> None:
        """Let a thread wait for the disk, unless it still does."""
        if self._syncing is None or self._syncing.done():
            self._check_sync()
            self._syncer = self._syncer or ThreadPoolExecutor(1)
            self._syncing = self._syncer.submit(os.fdatasync, self._file.fileno())
            self._synced_until = self.size

    def _check_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # the error of a disk is told once only

    def flush(self) -> None:
        """Nothing: the end of a tensor is no reason to write a block early."""

    def close(self) -> dict[str, Any]:
        """Wait until the file is on the disk; its entry in ``checksums.json``."""
        with self._file:
            self._file.flush()
            self._check_sync()
            os.fsync(self._file.fileno())
        self._end_syncer()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close without waiting for the disk; the file is of no use."""
        self._end_syncer()
        with contextlib.suppress(OSError):
            self._file.close()

    def _end_syncer(self) -> None:
        if self._syncer is not None:
            self._syncer.shutdown()


def describe(data: bytes) -> dict[str, Any]:
    """The entry in ``checksums.json`` of a small file."""
    return {"bytes": len(data), "sha256": sha256(data)}


def describe_file(path: Path) -> dict[str, Any]:
    """The entry in ``checksums.json`` of a file that is on the disk."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def marker(iteration: int, files: dict[str, dict[str, Any]]) -> bytes:
    """The content of ``checksums.json``; its own checksum is of iteration and files."""
    content = {"format": 1, "iteration": iteration, "files": files}
    return json.dumps(content | {"sha256": _own_checksum(content)}, indent=1, sort_keys=True).encode()


def _own_checksum(content: dict[str, Any]) -> str:
    told = [content["format"], content["iteration"], content["files"]]
    return sha256(json.dumps(told, sort_keys=True))


def read_marker(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of ``checksums.json`` by file name; None if the checkpoint has no such file.

    Raises DamagedCheckpoint if the file is not one of ours, or names files elsewhere.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _LARGEST_LIST:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = json.loads(path.read_bytes())
        intact = content["sha256"] == _own_checksum(content)
        files = {
            str(name): {key: entry[key] for key in ("bytes", "sha256")}
            for name, entry in content["files"].items()
        }
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
    if not intact:
        raise DamagedCheckpoint(f"{path} was altered")
    if not files or any(Path(name).name != name for name in files):
        raise DamagedCheckpoint(f"{path} must name files of its own folder")
    return files


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None; ``part`` of ``parts`` shares of the reading.

    Every share checks that the files are there and as long as they were; the checksums of the
    files are divided among the shares.
    """
    try:
        files = read_marker(folder)
        if files is None:
            return _damage_without_marker(folder)
    except DamagedCheckpoint as error:
        return str(error)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}"
    for name in sorted(files)[part::parts]:
        if sha256_file(folder / name) != files[name]["sha256"]:
            return f"{folder / name} was altered (its SHA-256 is not the one in {CHECKSUMS})"
    return None


def is_as_written(path: Path) -> bool:
    """Whether a file of a checkpoint is the one that its ``checksums.json`` names."""
    try:
        entry = (read_marker(path.parent) or {}).get(path.name)
    except DamagedCheckpoint:
        return False
    return entry is not None and path.is_file() and entry == describe_file(path)


def _damage_without_marker(folder: Path) -> str | None:
    if not (folder / "metadata.json").is_file():
        return f"{folder / 'metadata.json'} is missing: not a complete torch_dist checkpoint"
    try:
        common = load_object(folder / "common.pt")
        metadata = load_metadata(folder)
    except DamagedCheckpoint as error:
        return str(error)
    if "pangu_pro" in common:
        return f"{folder / CHECKSUMS} is missing"
    for place in metadata.storage_data.values():
        path = folder / place.relative_path
        if not path.is_file() or path.stat().st_size < place.offset + place.length:
            return f"{path} is missing or too short"
    return None

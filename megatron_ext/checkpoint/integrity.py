"""Detects incomplete and altered checkpoints.

Each checkpoint of ours has a ``checksums.json``, written last, with the size and SHA-256 of every other
file. Megatron-LM's checkpoints have none; for these the existence of every file, and its length according to
the metadata, are checked.
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
from megatron_ext.common.files import pieces_digest, sha256, sha256_file

CHECKSUMS = "checksums.json"
#: The checksums of 100,000 files need less.
_MAX_LIST_BYTES = 1 << 25
#: Bytes hashed and written at a time: they are then still in the processor's cache.
_CHUNK = 1 << 20
#: Bytes after which an fdatasync is started, so that the disk works before the last byte is written.
_SYNC_BYTES = 1 << 26


class HashingStream:
    """A file being written, and the SHA-256 of its content."""

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
        """Start an fdatasync in a thread, unless one is still running."""
        if self._syncing is None or self._syncing.done():
            self._check_sync()
            self._syncer = self._syncer or ThreadPoolExecutor(1)
            self._syncing = self._syncer.submit(os.fdatasync, self._file.fileno())
            self._synced_until = self.size

    def _check_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # the system reports a disk error only once

    def flush(self) -> None:
        """Does nothing: torch flushes after each tensor, which would write small blocks."""

    def close(self) -> dict[str, Any]:
        """Wait until the file is on disk; returns its entry in ``checksums.json``."""
        with self._file:
            self._file.flush()
            self._check_sync()
            os.fsync(self._file.fileno())
        self._end_syncer()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close without waiting for the disk; the file will be removed."""
        self._end_syncer()
        with contextlib.suppress(OSError):
            self._file.close()

    def _end_syncer(self) -> None:
        if self._syncer is not None:
            self._syncer.shutdown()


def describe(data: bytes) -> dict[str, Any]:
    """The entry in ``checksums.json`` of a file with content ``data``."""
    return {"bytes": len(data), "sha256": sha256(data)}


def describe_file(path: Path) -> dict[str, Any]:
    """The entry in ``checksums.json`` of an existing file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def marker(iteration: int, files: dict[str, dict[str, Any]]) -> bytes:
    """The content of ``checksums.json``, including its own checksum over iteration and files."""
    content = {"format": 1, "iteration": iteration, "files": files}
    return json.dumps(content | {"sha256": _own_checksum(content)}, indent=1, sort_keys=True).encode()


def _own_checksum(content: dict[str, Any]) -> str:
    hashed = [content["format"], content["iteration"], content["files"]]
    return sha256(json.dumps(hashed, sort_keys=True))


def read_marker(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of ``checksums.json`` by file name; None if the checkpoint has no such file.

    Raises DamagedCheckpoint if the file is invalid, or names files outside of the folder.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
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


def weights_sha256(folder: Path) -> str:
    """A sha256 over the files with tensors: that of the same model written again, wherever it is.

    From ``checksums.json``, and without it (Megatron-LM) from evenly spread pieces of each file.
    """
    marked = read_marker(folder)
    if marked is None:
        files = {path.name: pieces_digest(path) for path in folder.glob("*.distcp")}
    else:
        files = {name: entry["sha256"] for name, entry in marked.items() if name.endswith(".distcp")}
    return sha256(json.dumps(files, sort_keys=True))


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Check a checkpoint; returns a description of the damage, or None.

    The check is divided into ``parts``, of which this is ``part``: each part checks that all files exist with
    the right length; the checksums are divided among the parts.
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
    """Whether a file of a checkpoint matches its entry in ``checksums.json``."""
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

"""Knows a complete, unaltered checkpoint from a torn or altered one.

Each checkpoint of ours holds ``checksums.json``, written last: size and SHA-256 of every other
file. Checkpoints made by Megatron-LM have none; of those it is checked that every file is there
and as long as the metadata says.
"""

import hashlib
import json
import os
from pathlib import Path

from megatron_ext.training.checkpointing.errors import DamagedCheckpoint
from megatron_ext.training.checkpointing.safe import load_metadata, load_object

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22


class HashingStream:
    """A file being written, and the SHA-256 of what went into it."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=_BLOCK)  # noqa: SIM115 (closed by close)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data) -> int:
        """Append bytes."""
        view = memoryview(data)
        self._hash.update(view)
        self._file.write(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing: the end of a tensor is no reason to write a block early."""

    def close(self) -> dict:
        """Wait until the file is on the disk; its entry in ``checksums.json``."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close without waiting; the file is of no use."""
        self._file.close()


def describe(data: bytes) -> dict:
    """The entry in ``checksums.json`` of a small file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe_file(path: Path) -> dict:
    """The entry in ``checksums.json`` of a file that is on the disk."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def marker(iteration: int, files: dict[str, dict]) -> bytes:
    """The content of ``checksums.json``; its own checksum is of iteration and files."""
    content = {"format": 1, "iteration": iteration, "files": files}
    return json.dumps(content | {"sha256": _own_checksum(content)}, indent=1, sort_keys=True).encode()


def _own_checksum(content: dict) -> str:
    told = [content["format"], content["iteration"], content["files"]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_marker(folder: Path) -> dict[str, dict] | None:
    """The entries of ``checksums.json`` by file name; None if the checkpoint has no such file.

    Raises DamagedCheckpoint if the file is not one of ours, or names files elsewhere.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
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
        if _sha256(folder / name) != files[name]["sha256"]:
            return f"{folder / name} was altered (its SHA-256 is not the one in {CHECKSUMS})"
    return None


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

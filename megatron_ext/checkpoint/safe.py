"""Reads the pickles in a checkpoint without executing code from them.

A pickle can call any function. Here a name outside a short list of harmless classes is an error:
``common.pt`` and the objects in ``*.distcp`` are read by torch's weights-only unpickler, and
``.metadata``, a plain pickle, by our own.
"""

import contextlib
import io
import math
import pickle
import signal
import warnings
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.checkpoint.bounds import bytes_in, require_bounded, require_stored_archive
from megatron_ext.checkpoint.errors import DamagedCheckpoint

_DCP = "torch.distributed.checkpoint"
#: The classes that torch.distributed.checkpoint and Megatron-Core use in ``.metadata``.
_METADATA_CLASSES = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise DamagedCheckpoint(f"it asks for {module}.{name}, which no checkpoint needs")


@cache
def _harmless_classes() -> list[Any]:
    """The classes allowed in common.pt and sharded objects besides tensors and plain values."""
    import numpy
    from numpy.core.multiarray import _reconstruct

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import names a deprecated module of NumPy
        from megatron.core.safe_globals import SAFE_GLOBALS
    kinds = [type(numpy.dtype(kind)) for kind in ("u4", "u8", "i4", "i8", "f4", "f8", "?")]
    # The same function under its names before and since NumPy 2.
    names = [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    # Upstream stores --exit-signal, which Python 3.10 pickles by its own name, later versions by class.
    names += [(member, f"signal.{member.name}") for member in signal.Signals]
    return [*SAFE_GLOBALS, *kinds, *names]


def load_object(source: str | Path | io.BytesIO, name: str | None = None, legacy: bool = False) -> Any:
    """``torch.load`` of tensors, plain values and harmless classes, onto the CPU.

    ``legacy`` reads torch's format before zip archives, which Transformer Engine still uses.

    Raises DamagedCheckpoint, naming ``name`` (by default ``source``), for anything else, and for content
    that would expand beyond the limits (``bounds.py``).
    """
    try:
        with contextlib.ExitStack() as stack:
            file = source if isinstance(source, io.BytesIO) else stack.enter_context(open(source, "rb"))
            (_require_bounded_pickles if legacy else require_bounded_archive)(file)
            stack.enter_context(torch.serialization.safe_globals(_harmless_classes()))
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{source} is missing") from None
    except Exception as error:
        # torch puts its advice before the reason.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        raise DamagedCheckpoint(f"{name or source} cannot be read safely: {reason}") from error


def require_bounded_archive(file: IO[bytes]) -> None:
    """Raise Unbounded if an archive of torch.save would expand beyond the limits; rewinds the file."""
    size = file.seek(0, io.SEEK_END)
    require_bounded(require_stored_archive(file, size))
    file.seek(0)


def _require_bounded_pickles(file: IO[bytes]) -> None:
    """The same for the legacy format: five pickles (the fourth is the object), then raw data."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    for _ in range(5):
        require_bounded(file, size)
    file.seek(0)


def load_metadata(folder: Path) -> Metadata:
    """Read the ``Metadata`` of torch.distributed.checkpoint in ``folder``: the locations of all shards.

    Raises DamagedCheckpoint if it is missing, cannot be read, names a file outside of the folder, or
    describes more bytes than the files have.
    """
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
        require_bounded(data)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        _require_consistent(metadata, folder)
        files = {place.relative_path for place in metadata.storage_data.values()}
        fields = metadata.state_dict_metadata
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read safely: {error}") from error
    outside = sorted(file for file in files if Path(file).name != file)
    if outside or not fields:
        raise DamagedCheckpoint(f"{path} names {outside or 'nothing'}; files must lie in the same folder")
    return metadata


def _require_consistent(metadata: Metadata, folder: Path) -> None:
    """Raise ValueError unless the metadata has the types that its readers expect, and fits the files."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it is not the metadata of torch.distributed.checkpoint")
    for place in metadata.storage_data.values():
        numbers = all(type(number) is int and number >= 0 for number in (place.offset, place.length))
        if type(place.relative_path) is not str or not numbers or place.transform_descriptors:
            raise ValueError("it names an invalid location")
    described = sum(
        math.prod(stored.size) * stored.properties.dtype.itemsize
        for key, stored in metadata.state_dict_metadata.items()
        if type(key) is str and isinstance(stored, TensorStorageMetadata)
    )
    available = bytes_in(folder)
    if described > available:
        raise ValueError(f"it describes tensors of {described} bytes, and the files have {available}")

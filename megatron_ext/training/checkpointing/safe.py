"""Reads the pickles in a checkpoint without running anything that they ask for.

A pickle can name any function to be called. Here a name outside a short list of harmless classes
is an error: for ``common.pt`` and the objects in ``*.distcp`` through torch's weights-only
unpickler, for ``.metadata``, a plain pickle, through one of our own.
"""

import io
import pickle
import pickletools
import signal
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_ext.training.checkpointing.errors import DamagedCheckpoint

_DCP = "torch.distributed.checkpoint"
#: What torch.distributed.checkpoint and Megatron-Core put into ``.metadata``.
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
def _harmless_classes() -> list:
    """What common.pt and sharded objects may hold besides tensors and plain values."""
    import numpy
    from numpy.core.multiarray import _reconstruct

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import names a deprecated module of NumPy
        from megatron.core.safe_globals import SAFE_GLOBALS
    kinds = [type(numpy.dtype(kind)) for kind in ("u4", "u8", "i4", "i8", "f4", "f8", "?")]
    # The same function under the name it had before NumPy 2 and the one it has since.
    names = [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    # Upstream stores --exit-signal, which Python 3.10 pickles by its own name, later ones by its class.
    names += [(member, f"signal.{member.name}") for member in signal.Signals]
    return [*SAFE_GLOBALS, *kinds, *names]


def load_object(source: str | Path | io.BytesIO, name: str | None = None) -> Any:
    """``torch.load`` of tensors, plain values and harmless classes, onto the CPU.

    Raises DamagedCheckpoint, naming ``name`` (by default ``source``), for anything else.
    """
    try:
        with torch.serialization.safe_globals(_harmless_classes()):
            return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{source} is missing") from None
    except Exception as error:
        # torch puts its advice before the reason.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        raise DamagedCheckpoint(f"{name or source} cannot be read safely: {reason}") from error


def require_modest(data: bytes) -> None:
    """Raise if a pickle numbers its objects beyond what it can hold, or is cut off.

    The unpickler makes a table up to the largest number: five bytes can ask for gigabytes of memory.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise DamagedCheckpoint(f"it numbers an object {argument}, though it has {len(data)} bytes")


def load_metadata(folder: Path):
    """The ``Metadata`` of torch.distributed.checkpoint in ``folder``: what lies where.

    Raises DamagedCheckpoint if it is missing, cannot be read, or names a file elsewhere.
    """
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
        require_modest(data)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        files = {place.relative_path for place in metadata.storage_data.values()}
        fields = metadata.state_dict_metadata.items()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read safely: {error}") from error
    outside = sorted(str(file) for file in files if Path(str(file)).name != str(file))
    if outside or not fields:
        raise DamagedCheckpoint(f"{path} names {outside or 'nothing'}; files must lie in the same folder")
    return metadata

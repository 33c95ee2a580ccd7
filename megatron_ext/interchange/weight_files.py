"""The tensors of a Hugging Face folder by name: safetensors in one piece or several, or pickles on demand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.common.errors import first_line
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.json_file import read_object

#: Buffers that old exports carry along; they follow from the configuration.
DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAFE, _PICKLE = "model.safetensors", "pytorch_model.bin"


class WeightFiles:
    """The tensors of a folder by name, wherever they lie; one file is open at a time.

    Attributes:
        sizes: name -> size. dtype: of the tensors; the widest where they differ.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder = folder
        kind, files, index = _find_files(folder, allow_pickle)
        self._open_file = _Pickled if kind == _PICKLE else _open_safetensors
        self.sizes: dict[str, torch.Size] = {}
        self._places: dict[str, str] = {}
        dtypes = set()
        for file in files:
            for name, (size, dtype) in self._open(file).items():
                if index and index.get(name) != file:
                    raise InterchangeError(f"{folder / file} holds {name}, which the index does not say")
                self._places[name], self.sizes[name] = file, size
                if not name.endswith(DERIVED):
                    dtypes.add(dtype)
        if missing := sorted(set(index) - set(self._places)):
            raise InterchangeError(f"{folder / index[missing[0]]} lacks {', '.join(missing[:4])}")
        if not dtypes:
            raise InterchangeError(f"{folder} holds no tensors")
        self.dtype = widest(dtypes)

    def get(self, name: str) -> Tensor:
        """The tensor of that name; a view of the mapped file."""
        file = self._places[name]
        if self._opened != file:
            self._open(file)
        try:
            return self._tensors.get_tensor(name)
        except SafetensorError as error:
            raise InterchangeError(f"{self.folder / file}: {name} cannot be read: {error}") from error

    def _open(self, file: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        path = self.folder / file
        if not path.is_file():
            raise InterchangeError(f"{path} is missing")
        self._opened = file
        self._tensors = self._open_file(path)
        return dict(_describe(path, self._tensors))


def _find_files(folder: Path, allow_pickle: bool) -> tuple[str, list[str], dict[str, str]]:
    """Which of the two kinds, the files with weights, and what the index says lies where; {} without one.

    Safetensors come before pickles. A file and an index that leads elsewhere are two models.
    """
    for name in (_SAFE, *((_PICKLE,) if allow_pickle else ())):
        one, index = folder / name, folder / f"{name}.index.json"
        places = _read_index(index, Path(name).suffix) if index.is_file() else {}
        if places and one.is_file() and set(places.values()) != {name}:
            raise InterchangeError(
                f"{folder} holds {name} and {index.name}, which names {min(places.values())}: two models, of "
                "which one may be left from before; remove the one that is not meant"
            )
        if places or one.is_file():
            return name, sorted(set(places.values())) or [name], places
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles and not allow_pickle:
        raise InterchangeError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; "
            "take the safetensors files, or add --allow-pickle to read it as plain tensors (weights_only)"
        )
    raise InterchangeError(f"{folder}: there is no model.safetensors and no model.safetensors.index.json")


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    """Tensor -> file, as an index says it; files of that kind, in the same folder."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InterchangeError(f"{path} has no weight_map")
    files = {str(file): file for file in places.values()}
    outside = sorted(name for name, file in files.items() if Path(name).name != file)
    if outside:
        raise InterchangeError(f"{path} names {outside[0]}; files must lie in the same folder")
    if other := sorted(name for name in files if not name.endswith(suffix)):
        raise InterchangeError(f"{path} names {other[0]}, which is no {suffix} file")
    return dict(places)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InterchangeError(
            f"{path} is truncated, or is not a safetensors file: {error}; fetch it again"
        ) from error


class _Pickled:
    """``pytorch_model.bin``, mapped into memory, read by torch's weights-only unpickler."""

    def __init__(self, path: Path):
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise InterchangeError(f"{path} cannot be read as plain tensors: {first_line(error)}") from error
        if not isinstance(self._tensors, dict):
            raise InterchangeError(f"{path} holds no names and tensors")
        for name, tensor in self._tensors.items():
            if not isinstance(name, str) or not _is_stored(tensor):
                raise InterchangeError(f"{path}: {name!r} is no plain tensor")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _is_stored(tensor: object) -> bool:
    """Whether every number of a tensor lies in the file; a stride of 0 makes gigabytes of a few bytes."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _describe(path: Path, tensors: Any) -> Iterator[tuple[str, tuple[torch.Size, torch.dtype]]]:
    """Name -> size and dtype of each tensor in one file; raises for numbers that are not floating point."""
    for name in tensors.keys():  # noqa: SIM118 (not a dict)
        if isinstance(tensors, _Pickled):
            tensor = tensors.get_tensor(name)
            size, dtype = tensor.size(), tensor.dtype
        else:
            piece = tensors.get_slice(name)
            size, dtype = torch.Size(piece.get_shape()), _FLOATS.get(piece.get_dtype())
        if dtype not in _FLOATS.values() and not name.endswith(DERIVED):
            raise InterchangeError(
                f"{path}: {name} is quantised or not a number; only fp32, fp16 and bf16 are"
            )
        yield name, (size, dtype)


def widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The narrowest format that holds the numbers of all."""
    first, *others = dtypes
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first

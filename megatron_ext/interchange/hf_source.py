"""A Hugging Face folder: ``config.json`` and safetensors files, in one piece or several."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.interchange import tokenizer_files
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_config import read_shape
from megatron_ext.interchange.mapping import architecture_named
from megatron_ext.interchange.source import Source
from megatron_ext.training.checkpointing.integrity import CHECKSUMS, damage

#: Buffers that old exports carry along; they follow from the configuration.
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HuggingFaceSource(Source):
    """Tensors are views of memory-mapped files; of several parts one is open at a time."""

    kind = "hf"

    def __init__(self, path: Path, allow_pickle: bool = False, tokenizer_model: str | Path | None = None):
        self.path = path
        if (path / CHECKSUMS).exists() and (problem := damage(path)):
            raise InterchangeError(problem)
        config = read_json(path / "config.json")
        architecture = architecture_named(str(config.get("model_type")))
        self._files = WeightFiles(path, allow_pickle)
        self.shape = read_shape(config, self._files.dtype)
        self._entries = {entry.ours: entry for entry in architecture.entries_of(self.shape)}
        self._require_names()
        self.tokenizer = self._find_tokenizer(tokenizer_model)
        self.origin = f"a {architecture.class_name}"

    def _require_names(self) -> None:
        """Raise unless the files hold the tensors of the configuration, in their sizes, and no others."""
        sizes = self.shape.parameters()
        expected = {
            name: size
            for entry in self._entries.values()
            for name, size in zip(
                entry.theirs, entry.layout.sizes(sizes[entry.ours], self.shape), strict=True
            )
        }
        there = self._files.sizes
        problems = [f"{name} is missing" for name in expected if name not in there]
        problems += [
            f"{name} is {list(there[name])}, config.json says {list(size)}"
            for name, size in expected.items()
            if name in there and there[name] != size
        ]
        problems += [
            f"{name} is not part of this architecture"
            for name in there
            if name not in expected and not name.endswith(_DERIVED) and not self._is_tied_head(name)
        ]
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise InterchangeError(f"{self.path}: {'; '.join(problems[:4])}{more}")

    def _is_tied_head(self, name: str) -> bool:
        """Whether a tensor is the head that a tied model shares with its embedding, written twice."""
        if not self.shape.tied or name not in ("lm_head.weight", "output.weight"):
            return False
        embedding = self._entries["embedding.word_embeddings.weight"].theirs[0]
        if torch.equal(self._files.get(name), self._files.get(embedding)):
            return True
        raise InterchangeError(f"{self.path}: config.json ties {name} to {embedding}, but they differ")

    def _find_tokenizer(self, given: str | Path | None) -> tokenizer_files.TokenizerFiles | None:
        own = tokenizer_files.of_folder(self.path)
        tokenizer = own if given is None else tokenizer_files.of_path(given)
        if own and tokenizer and own.sha256 != tokenizer.sha256:
            raise InterchangeError(
                f"--tokenizer-model {given} is not the tokenizer in {self.path}: the model's ids mean "
                "other pieces"
            )
        if tokenizer:
            tokenizer_files.require_fit(tokenizer, self.shape.vocab_size, self.path)
        return tokenizer

    def _read(self, key: str) -> Tensor:
        entry = self._entries[key]
        return entry.layout.join([self._files.get(name) for name in entry.theirs], self.shape)


class WeightFiles:
    """The tensors of a folder by name, wherever they lie; one file is open at a time.

    Attributes:
        sizes: name -> size. dtype: of the tensors; the widest where they differ.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder = folder
        files, index = _find_files(folder, allow_pickle)
        self.sizes: dict[str, torch.Size] = {}
        self._places: dict[str, str] = {}
        dtypes = set()
        for file in files:
            for name, (size, dtype) in self._open(file).items():
                if index and index.get(name) != file:
                    raise InterchangeError(f"{folder / file} holds {name}, which the index does not say")
                self._places[name], self.sizes[name] = file, size
                dtypes.add(dtype)
        if missing := sorted(set(index) - set(self._places)):
            raise InterchangeError(f"{folder / index[missing[0]]} lacks {', '.join(missing[:4])}")
        if not dtypes - {None}:
            raise InterchangeError(f"{folder} holds no tensors")
        self.dtype = _widest(dtypes)

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
        self._tensors = _Pickled(path) if path.suffix == ".bin" else _open_safetensors(path)
        return dict(_describe(path, self._tensors))


def _find_files(folder: Path, allow_pickle: bool) -> tuple[list[str], dict[str, str]]:
    """The files with weights, and what the index says lies where; {} for a folder in one piece."""
    for name in ("model.safetensors", *(("pytorch_model.bin",) if allow_pickle else ())):
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = _read_index(index)
            return sorted(set(places.values())), places
        if (folder / name).is_file():
            return [name], {}
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles and not allow_pickle:
        raise InterchangeError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; "
            "take the safetensors files, or add --allow-pickle to read it as plain tensors (weights_only)"
        )
    raise InterchangeError(f"{folder}: there is no model.safetensors and no model.safetensors.index.json")


def _read_index(path: Path) -> dict[str, str]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InterchangeError(f"{path} has no weight_map")
    outside = sorted({str(file) for file in places.values() if Path(str(file)).name != file})
    if outside:
        raise InterchangeError(f"{path} names {outside[0]}; files must lie in the same folder")
    return dict(places)


def _open_safetensors(path: Path):
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
            reason = str(error).strip().split("\n")[0]
            raise InterchangeError(f"{path} cannot be read as plain tensors: {reason}") from error

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _describe(path: Path, tensors):
    """Name -> size and dtype of each tensor in one file; raises for numbers that are not floating point."""
    for name in tensors.keys():  # noqa: SIM118 (not a dict)
        if isinstance(tensors, _Pickled):
            tensor = tensors.get_tensor(name)
            size, dtype = tensor.size(), tensor.dtype
        else:
            piece = tensors.get_slice(name)
            size, dtype = torch.Size(piece.get_shape()), _FLOATS.get(piece.get_dtype())
        if dtype not in _FLOATS.values() and not name.endswith(_DERIVED):
            raise InterchangeError(
                f"{path}: {name} is quantised or not a number; only fp32, fp16 and bf16 are"
            )
        yield name, (size, dtype)


def _widest(dtypes: set[torch.dtype | None]) -> torch.dtype:
    known = [dtype for dtype in dtypes if dtype is not None]
    widest = known[0]
    for dtype in known[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def read_json(path: Path) -> dict:
    """A JSON object; raises InterchangeError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InterchangeError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InterchangeError(f"{path} does not hold a JSON object")
    return content

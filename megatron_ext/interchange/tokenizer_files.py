"""Which tokenizer belongs to a model, as files; nothing is built or downloaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.tokenizer.build import HUGGINGFACE_FILES, SENTENCEPIECE_TYPES, folder_sha256

#: Files of a Hugging Face folder that go with a tokenizer without deciding its ids.
_BESIDE = ("chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as Megatron's flags name it.

    Attributes:
        kind: ``--tokenizer-type``: SentencePieceTokenizer, HuggingFaceTokenizer or NullTokenizer.
        model: ``--tokenizer-model``: the SentencePiece file, the Hugging Face folder, or None.
        size: number of ids, without padding.
        sha256: of the files that decide the ids, as checkpoints store it.
    """

    kind: str
    model: Path | None
    size: int
    sha256: str

    @property
    def files(self) -> list[Path]:
        """The files that decide the ids."""
        if self.model is None:
            return []
        if self.model.is_file():
            return [self.model]
        return [self.model / name for name in HUGGINGFACE_FILES if (self.model / name).is_file()]

    @property
    def companions(self) -> list[Path]:
        """What transformers wants beside the files; [] for a SentencePiece model that stands alone."""
        if self.model is None:
            return []
        folder = self.model.parent if self.model.is_file() else self.model
        if self.model.is_file() and not (
            self.model.name == "tokenizer.model" and (folder / "tokenizer_config.json").is_file()
        ):
            return []
        names = (*HUGGINGFACE_FILES, *_BESIDE)
        return [path for name in names if (path := folder / name).is_file() and path not in self.files]

    def copy_into(self, folder: Path) -> None:
        """Copy files and companions, under their names; a SentencePiece model becomes ``tokenizer.model``."""
        if self.model is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for file in (*self.files, *self.companions):
            shutil.copyfile(file, folder / ("tokenizer.model" if file is self.model else file.name))

    def moved_to(self, folder: Path) -> TokenizerFiles:
        """The same tokenizer, where :meth:`copy_into` put it."""
        if self.model is None:
            return self
        model = folder / "tokenizer.model" if self.model.is_file() else folder
        return TokenizerFiles(self.kind, model, self.size, self.sha256)


def of_path(path: str | Path) -> TokenizerFiles:
    """The tokenizer in a SentencePiece file or a Hugging Face folder; raises InterchangeError."""
    path = Path(path)
    if path.is_file():
        return _sentencepiece(path)
    if found := of_folder(path):
        return found
    raise InterchangeError(f"--tokenizer-model {path}: neither a SentencePiece file nor a tokenizer's folder")


def of_folder(folder: Path) -> TokenizerFiles | None:
    """The tokenizer in a Hugging Face folder; None if it holds none.

    A plain ``tokenizer.model`` is preferred, for its ids are reproduced by the native encoder; with
    tokens added to it, the folder's own description is what counts.
    """
    pieces, described = folder / "tokenizer.model", folder / "tokenizer.json"
    plain = _sentencepiece(pieces) if pieces.is_file() and _is_sentencepiece(pieces) else None
    size = _described_size(described) if described.is_file() else None
    if plain and (size is None or size == plain.size) and not _added(folder, plain.size):
        return plain
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    if size is None:
        size = max(len(read_json(folder / "vocab.json")), _added(folder, 0), plain.size if plain else 0)
    return TokenizerFiles("HuggingFaceTokenizer", folder, size, folder_sha256(folder))


def of_args(args: Namespace) -> TokenizerFiles | None:
    """The tokenizer that a checkpoint's args name; None if its files are not there (any more)."""
    kind, model = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if kind == "NullTokenizer":
        return null(args.vocab_size + 1)
    if not model or not Path(model).exists():
        return None
    if kind in SENTENCEPIECE_TYPES:
        return _sentencepiece(Path(model))
    return of_folder(Path(model)) if kind == "HuggingFaceTokenizer" else None


def null(size: int) -> TokenizerFiles:
    """No tokenizer: ids are numbers, the last of ``size`` ends a document."""
    digest = hashlib.sha256(f"NullTokenizer {size - 1}".encode()).hexdigest()
    return TokenizerFiles("NullTokenizer", None, size, digest)


def require_fit(tokenizer: TokenizerFiles, rows: int, source: Path) -> None:
    """Raise InterchangeError if the tokenizer has ids that the model of ``source`` has no rows for."""
    if tokenizer.size > rows:
        raise InterchangeError(
            f"the tokenizer {tokenizer.model} has {tokenizer.size} ids, but {source} has {rows} rows in its "
            "embedding: it belongs to another model"
        )


def _is_sentencepiece(path: Path) -> bool:
    """Other tokenizers (tiktoken's) use the same name for plain text."""
    with open(path, "rb") as file:
        return file.read(1) == b"\n"  # the tag of the first field of a ModelProto: its pieces


def _sentencepiece(path: Path) -> TokenizerFiles:
    from megatron_ext.tokenizer.build import SentencePieceTokenizer

    built = SentencePieceTokenizer(path)
    return TokenizerFiles("SentencePieceTokenizer", path, built.vocab_size, built.sha256)


def _described_size(path: Path) -> int:
    """Ids that ``tokenizer.json`` knows, those of added tokens among them."""
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (token["id"] for token in content.get("added_tokens") or ())
        return 1 + max(max(ids, default=-1), max(added, default=-1))
    except (AttributeError, KeyError, TypeError) as error:
        raise InterchangeError(f"{path} does not describe a tokenizer: {error!r}") from error


def _added(folder: Path, size: int) -> int:
    """One more than the largest id of ``added_tokens.json`` from ``size`` on; 0 if there is none."""
    path = folder / "added_tokens.json"
    ids = read_json(path).values() if path.is_file() else ()
    return max((1 + token for token in ids if token >= size), default=0)


def read_json(path: Path) -> dict:
    """A JSON object, {} where there is no such file; raises InterchangeError naming the file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InterchangeError(f"{path} is not JSON: {error}") from error

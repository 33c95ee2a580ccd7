"""Which tokenizer belongs to a model, as files; nothing is built or downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.model_function import Saved
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.json_file import read_object
from megatron_ext.tokenizer.build import (
    HUGGINGFACE_FILES,
    SENTENCEPIECE_TYPES,
    TokenizerError,
    folder_sha256,
    null_sha256,
    require_no_code,
)

_LARGEST_ID = (1 << 24) - 1
#: Files of a Hugging Face folder that go with a tokenizer without deciding its ids.
_BESIDE = ("chat_template.jinja", "generation_config.json")
#: Entries of a model's ``config.json`` by which transformers chooses the class of its tokenizer.
_OF_CLASS = ("model_type", "tokenizer_class")


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
        if self.model.is_file() and not (
            self.model.name == "tokenizer.model" and (self.folder / "tokenizer_config.json").is_file()
        ):
            return []
        names = (*HUGGINGFACE_FILES, *_BESIDE)
        return [path for name in names if (path := self.folder / name).is_file() and path not in self.files]

    @property
    def for_transformers(self) -> bool:
        """Whether the files are a folder that transformers reads; else a SentencePiece model stands alone."""
        return bool(self.companions) or self.kind == "HuggingFaceTokenizer"

    @property
    def folder(self) -> Path:
        """Where the files are."""
        assert self.model is not None, "a NullTokenizer has no files"
        return self.model.parent if self.model.is_file() else self.model

    def copy_into(self, folder: Path) -> None:
        """Copy files and companions, under their names; a SentencePiece model becomes ``tokenizer.model``."""
        if self.model is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for file in (*self.files, *self.companions):
            shutil.copyfile(file, folder / ("tokenizer.model" if file is self.model else file.name))
        if self.for_transformers:
            self._copy_class(folder)

    def _copy_class(self, folder: Path) -> None:
        """Copy what ``config.json`` says of the tokenizer's class: transformers reads the rest by it."""
        config = read_object(self.folder / "config.json", missing={})
        decides = {name: config[name] for name in _OF_CLASS if isinstance(config.get(name), str)}
        if decides:
            (folder / "config.json").write_text(json.dumps(decides, indent=2) + "\n")

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

    A plain ``tokenizer.model`` is preferred, for its ids are reproduced by the native encoder. Where the
    files beside it say anything else of any id, they count, as in transformers.
    """
    pieces, known = folder / "tokenizer.model", known_tokens(folder)
    plain = _sentencepiece(pieces) if pieces.is_file() and _is_sentencepiece(pieces) else None
    if plain and _agree(pieces, known):
        return plain
    return _described(folder, known, plain)


def _agree(pieces: Path, known: dict[str, int]) -> bool:
    """Whether all ``known`` tokens are pieces of a SentencePiece model, under their ids."""
    from megatron_ext.tokenizer.build import SentencePieceTokenizer

    processor = SentencePieceTokenizer(pieces).processor
    return all(
        number < len(processor) and processor.id_to_piece(number) == token for token, number in known.items()
    )


def _described(folder: Path, known: dict[str, int], plain: TokenizerFiles | None) -> TokenizerFiles | None:
    """The tokenizer of a folder as transformers reads it."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    size = max(1 + max(known.values(), default=-1), plain.size if plain else 0)
    return TokenizerFiles("HuggingFaceTokenizer", folder, size, folder_sha256(folder))


def of_saved(saved: Saved) -> TokenizerFiles | None:
    """The tokenizer that a checkpoint's args name; None if its files are not there (any more)."""
    kind, model = saved.get("tokenizer_type"), saved.get("tokenizer_model")
    if kind == "NullTokenizer":
        size = saved.get("vocab_size")
        return None if size is None else null(size + 1)
    if not model or not Path(model).exists():
        return None
    if kind in SENTENCEPIECE_TYPES:
        return _sentencepiece(Path(model))
    folder = Path(model)
    return _described(folder, known_tokens(folder), None) if kind == "HuggingFaceTokenizer" else None


def is_code(folder: Path) -> bool:
    """Whether the tokenizer of a Hugging Face folder is Python code, which is not run here."""
    try:
        require_no_code(folder)
    except TokenizerError:
        return True
    return False


def null(size: int) -> TokenizerFiles:
    """No tokenizer: ids are numbers, the last of ``size`` ends a document."""
    return TokenizerFiles("NullTokenizer", None, size, null_sha256(size - 1))


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


def known_tokens(folder: Path) -> dict[str, int]:
    """Token -> id, of all that the JSON files of a Hugging Face folder say; {} where they say nothing.

    Raises InterchangeError where a file is not what its name promises, or two of them give a token two ids.
    """
    known: dict[str, int] = {}
    for path, tokens in _descriptions(folder):
        for token, number in tokens:
            if not isinstance(token, str) or type(number) is not int or not 0 <= number <= _LARGEST_ID:
                raise InterchangeError(f"{path} does not describe a tokenizer: {token!r} has id {number!r}")
            if known.setdefault(token, number) != number:
                raise InterchangeError(
                    f"{path}: {token!r} has id {number}, but elsewhere the tokenizer says {known[token]}"
                )
    return known


def _descriptions(folder: Path) -> Iterator[tuple[Path, list[tuple[object, object]]]]:
    """Each file that may give tokens ids, and what it gives."""
    for name, tokens_of in _TOKENS_OF.items():
        path = folder / name
        try:
            yield path, list(tokens_of(read_object(path, missing={})))
        except InterchangeError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InterchangeError(f"{path} does not describe a tokenizer: {error!r}") from error


def _of_description(content: dict[str, Any]) -> Iterator[tuple[object, object]]:
    """Of ``tokenizer.json``: the model's vocabulary, of a unigram model a list, and the added tokens."""
    vocabulary = content["model"]["vocab"] if content else {}
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    yield from vocabulary.items()
    yield from ((token["content"], token["id"]) for token in content.get("added_tokens") or ())


def _of_config(content: dict[str, Any]) -> Iterator[tuple[object, object]]:
    """Of ``tokenizer_config.json``."""
    for number, token in (content.get("added_tokens_decoder") or {}).items():
        yield token["content"], int(number)


_TOKENS_OF: dict[str, Callable[[dict[str, Any]], Iterable[tuple[object, object]]]] = {
    "tokenizer.json": _of_description,
    "vocab.json": dict.items,
    "added_tokens.json": dict.items,
    "tokenizer_config.json": _of_config,
}

"""Whether a Hugging Face folder's vocabulary is one to make data with.

Each id stands for one text, added tokens have the ids that the files say, and the token that ends documents
is in the files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.tokenizer.build import HuggingFaceTokenizer, Tokenizer, TokenizerError
from megatron_ext.tokenizer.checked import say_once


def require_vocabulary(tokenizer: Tokenizer, folder: str | Path | None, append_eod: bool) -> None:
    """Look at what transformers made of the files; what is odd and does no harm is said once in the log.

    Raises:
        TokenizerError: two texts have one id; or, with ``append_eod``, no file has the end of documents.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer) or folder is None:
        return
    ids, name = tokenizer.tokenizer.get_vocab(), f"--tokenizer-model {folder}"
    text_of: dict[int, str] = {}
    for text, number in ids.items():
        if text_of.setdefault(number, text) != text:
            raise TokenizerError(f"{name}: id {number} is both {text_of[number]!r} and {text!r}")
    if not (Path(folder) / "tokenizer.json").is_file():
        return
    description = _content(Path(folder) / "tokenizer.json")
    stated = list(_stated(description, Path(folder)))
    for text, number in stated:
        if ids.get(text, number) != number:
            say_once(f"{name}: gives {text!r} id {number}, which is taken; transformers gives it {ids[text]}")
    end, vocab = text_of.get(tokenizer.eod), (description.get("model") or {}).get("vocab") or ()
    if end not in {text for text, _ in stated} and end not in {_piece(one) for one in vocab}:
        said = (
            f"{name}: documents end with {end!r}, which tokenizer.json lacks: transformers gives it a new "
            f"id, {tokenizer.eod}, which no model of this tokenizer knows; name another eos_token"
        )
        if append_eod:
            raise TokenizerError(said)
        say_once(said)


def _stated(description: dict[str, Any], folder: Path) -> Iterator[tuple[str, int]]:
    """The added tokens of all files, with the ids that these say."""
    for token in description.get("added_tokens") or []:
        yield token["content"], token["id"]
    for number, token in (
        _content(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    ).items():
        yield token["content"], int(number)
    yield from _content(folder / "added_tokens.json").items()


def _content(path: Path) -> dict[str, Any]:
    """What a file says that transformers has read; {} where there is none."""
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _piece(entry: str | list[Any]) -> str:
    """Of a vocabulary that is a map, or a list of [piece, score]."""
    return entry if isinstance(entry, str) else entry[0]

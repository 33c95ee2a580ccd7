"""The libraries that benchmarks/tokenization.py compares: how each is loaded, and what it has not.

A contender is loaded anew for each cold measurement, for most have no way to forget the words that they met.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from megatron_ext.tokenizer.build import HuggingFaceTokenizer, build_tokenizer, flags_of
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.encoding import make_encode
from megatron_ext.tokenizer.hf_export import NotExpressible, fast_tokenizer

#: documents -> ids of each, as the library gives them
Work = Callable[[list[str]], object]
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Absent(Exception):
    """The library is not installed, or does not read the tokenizer; the message says which."""


@dataclass(frozen=True)
class Contender:
    """A library with one tokenizer.

    Attributes:
        load: returns its work with nothing remembered.
        forget: makes that of a loaded one, where it can; it is loaded anew where it cannot.
        remembers: whether it is faster on words that it met before.
    """

    load: Callable[[], Work]
    forget: Callable[[], None] | None = None
    remembers: bool = True


def contenders(path: Path) -> Iterator[tuple[str, Contender | Absent]]:
    """(name, contender or why it is absent), the tokenizer's own library first."""
    makers = _of_folder(path) if path.is_dir() else _of_sentencepiece(path)
    for name, make in makers.items():
        try:
            yield name, make()
        except ImportError as error:
            yield name, Absent(f"not installed ({error})")
        except (Absent, NotExpressible, ValueError, RuntimeError) as error:
            yield name, Absent(str(error).splitlines()[0])


def _of_sentencepiece(path: Path) -> dict[str, Callable[[], Contender]]:
    encoder = NativeEncoder(path)

    def sentencepiece() -> Contender:
        encode = encoder.processor.encode
        return Contender(lambda: lambda texts: [encode(text) for text in texts], remembers=False)

    def two_threads_of_sentencepiece() -> Contender:
        encode = encoder.processor.encode
        return Contender(lambda: lambda texts: encode(texts, num_threads=2), remembers=False)

    def tokenizers() -> Contender:
        return _tokenizers(fast_tokenizer(encoder))

    def ours(threads: int) -> Contender:
        return Contender(lambda: lambda texts: encoder.encode_batch(texts, threads), encoder.clear_cache)

    def gigatoken() -> Contender:
        from gigatoken import Tokenizer

        content = path.read_bytes()
        Tokenizer.from_sentencepiece(content)
        return Contender(lambda: _one_by_one(Tokenizer.from_sentencepiece(content).backend.encode))

    return {
        "sentencepiece": sentencepiece,
        "sentencepiece, 2 threads": two_threads_of_sentencepiece,
        "tokenizers": tokenizers,
        "kitoken": lambda: _kitoken(path),
        "tiktoken": _no_tiktoken,
        "gigatoken": gigatoken,
        "ours": lambda: ours(1),
        "ours, 2 threads": lambda: ours(2),
    }


def _of_folder(path: Path) -> dict[str, Callable[[], Contender]]:
    tokenizer = build_tokenizer(flags_of(path))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    backend = tokenizer.tokenizer.backend_tokenizer

    def ours() -> Contender:
        def load() -> Work:
            encoder = make_encode(tokenizer)
            return lambda texts: encoder([text.encode() for text in texts])

        return Contender(load)

    def gigatoken() -> Contender:
        from gigatoken.gigatoken_rs import load_hf_json

        description = backend.to_str()
        load_hf_json(description)
        return Contender(lambda: _one_by_one(load_hf_json(description).encode))

    return {
        "tokenizers": lambda: _tokenizers(backend),
        "kitoken": lambda: _kitoken(path / "tokenizer.json"),
        "tiktoken": lambda: _tiktoken(tokenizer, json.loads(backend.to_str())),
        "gigatoken": gigatoken,
        "ours": ours,
    }


def _one_by_one(encode: Callable) -> Work:
    return lambda texts: [encode(text) for text in texts]


def _tokenizers(tokenizer) -> Contender:
    """Hugging Face's library, without offsets."""

    def encode(texts: list[str]) -> list[list[int]]:
        return [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return Contender(lambda: encode, remembers=False)


def _kitoken(path: Path) -> Contender:
    from kitoken import Kitoken

    loaded = Kitoken.from_file(str(path))
    special = path.suffix == ".json"  # each as the tokenizer's own library takes them
    return Contender(lambda: lambda texts: [loaded.encode(text, special) for text in texts], remembers=False)


def _no_tiktoken() -> Contender:
    raise Absent("reads byte-level BPE alone")


def _tiktoken(tokenizer: HuggingFaceTokenizer, description: dict) -> Contender:
    """Of a vocabulary whose ids are in the order of its merges; it knows no normalizer."""
    from tiktoken import Encoding

    ranks = {text: number for number, text in enumerate(tokenizer.token_texts()) if text}
    special = tokenizer.special_tokens()
    loaded = Encoding("_", pat_str=_pattern(description), mergeable_ranks=ranks, special_tokens=special)

    def encode(texts: list[str]) -> list[list[int]]:
        return [loaded.encode(text, allowed_special="all") for text in texts]

    return Contender(lambda: encode, remembers=False)


def _pattern(description: dict) -> str:
    """The regular expression that cuts a text."""
    splitting = description["pre_tokenizer"]
    steps = splitting["pretokenizers"] if splitting["type"] == "Sequence" else [splitting]
    found = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    found += [GPT2 for step in steps if step["type"] == "ByteLevel" and step["use_regex"]]
    if len(found) != 1:
        raise Absent("cuts texts by one regular expression, and the tokenizer has another number of them")
    return found[0]


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in ("sentencepiece", "tokenizers", "gigatoken", "tiktoken", "kitoken"):
        try:
            found[name] = version(name)
        except ImportError:
            found[name] = "absent"
    return found


def seconds(work: Work, texts: list[str]) -> tuple[float, float]:
    """(CPU, wall) seconds of the work."""
    cpu, wall = time.process_time(), time.perf_counter()
    work(texts)
    return time.process_time() - cpu, time.perf_counter() - wall

"""Compression of BPE tokenizers that Hugging Face's library describes: byte-level, or with byte fallback."""

from __future__ import annotations

import fnmatch
import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.tokenizer.bits_per_byte import BYTE_LEVEL_ALPHABET, lengths
from megatron_ext.tokenizer.bpe_json import BpeJson, Pair, read
from megatron_ext.tokenizer.build import HuggingFaceTokenizer
from megatron_ext.tokenizer.checked import Checked
from megatron_ext.tokenizer.compress import FILLER, CompressionError, TextEncoder, Vocabulary, choose
from megatron_ext.tokenizer.encoding import make_encode, refusals
from megatron_ext.tokenizer.hf_folder import (
    CONFIG,
    DESCRIPTION,
    HuggingFaceFolder,
    refuse_others,
    write_folder,
)

if TYPE_CHECKING:
    import tokenizers

#: What transformers is told ends documents where nothing does: a character of no text.
_NOWHERE = "\U0010fffd"
#: What may stand around a piece where its place in a text decides how the text is cut.
_AROUND = (("", ""), ("", "\n"), ("", "a"), ("a", ""), ("a", "a"))


class HuggingFaceEncoder:
    """The ids of a tokenizer.json, by the fastest encoder that gives them.

    Args:
        description: the tokenizer.json.
        special: a special token of it, which transformers shall take for the end of documents.
        vocab_size: number of ids.
        backend: one of ``encoding.BACKENDS``.
    """

    def __init__(self, description: bytes, special: str, vocab_size: int, backend: str) -> None:
        self.vocab_size = vocab_size
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, DESCRIPTION).write_bytes(description)
            Path(folder, CONFIG).write_text(json.dumps(config))
            tokenizer = HuggingFaceTokenizer(folder, use_fast=True)
        self.encode = Checked(make_encode(tokenizer, backend))

    def add_histogram(self, texts: Sequence[bytes], histogram: np.ndarray) -> None:
        """Adds to ``histogram``, int64 [vocab_size], how often each id occurs in the texts.

        Raises:
            EncodersDiffer: the encoder does not give the ids of Hugging Face's library.
        """
        histogram += np.bincount(self.encode(texts)[0], minlength=self.vocab_size)


@dataclass
class Drop:
    """Which added tokens shall go.

    Attributes:
        fillers: those that look like fillers and never occur.
        patterns: those that match one of these shell patterns.
    """

    fillers: bool = False
    patterns: Sequence[str] = field(default=())


class HuggingFaceModel:
    """A tokenizer of Hugging Face's to compress (:class:`compress.Compressible`).

    Args:
        folder: its files.
        drop: which added tokens shall go.
        backend: what encodes, one of ``encoding.BACKENDS``.

    Raises:
        ValueError: it cannot be read or compressed.
    """

    def __init__(self, folder: HuggingFaceFolder, drop: Drop | None = None, backend: str = "auto") -> None:
        self.folder, self.drop, self.backend = folder, drop or Drop(), backend
        self.bpe: BpeJson = read(folder.tokenizer_json, folder.name)
        self.tokenizer = _loaded(folder.tokenizer_json, folder.name)
        _require_same_ids(self.bpe, self.tokenizer, folder.name)
        folder.require_known({piece: i for i, piece in enumerate(self.bpe.pieces)})
        self.sha256 = folder.sha256
        self.roles = {self.bpe.pieces.index(token) for token in folder.roles}
        #: Ids that are tokens to transformers: a configuration may name a piece that is no added token.
        self.tokens = self.roles | self.bpe.added.keys()
        self.tokens |= {self.bpe.pieces.index(token) for token in folder.listed}

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        """Its own ids, fast."""
        special = [token["content"] for token in self.bpe.added.values() if token.get("special")]
        size, eos = len(self.bpe.pieces), special[0] if special else _NOWHERE
        return HuggingFaceEncoder(self.folder.tokenizer_json, eos, size, self.backend)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by Hugging Face's library, without special tokens around it."""
        return [one.ids for one in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token_bytes(self) -> np.ndarray:
        """How many bytes each id stands for, int32 [vocabulary]."""
        return lengths(self.bpe.text(i, piece) for i, piece in enumerate(self.bpe.pieces))

    def vocabulary(self, counts: np.ndarray) -> Vocabulary:
        """What is to be chosen from.

        Raises:
            CompressionError: a token that shall go is needed, or none matches.
        """
        bpe, pieces = self.bpe, self.bpe.pieces
        drop = self._dropped(counts)
        parts, merged = _parts(bpe, pieces)
        unknown = bpe.content["model"].get("unk_token")
        stay = self.tokens - drop
        fixed = np.array([i in stay or bpe.is_byte(p) or p == unknown for i, p in enumerate(pieces)])
        fillers = np.array([i in drop and not merged[i] for i in range(len(pieces))])
        dead = ~(fixed | fillers) & ~self._producible(pieces, parts, merged, counts)
        texts = [bpe.text(i, piece).decode(errors="replace") or piece for i, piece in enumerate(pieces)]
        return Vocabulary(texts, parts, fixed, dead, fillers)

    def _dropped(self, counts: np.ndarray) -> set[int]:
        """Ids of the added tokens that shall go."""
        pieces = self.bpe.pieces
        needed = self.bpe.ids_in_use() | self.roles
        drop: set[int] = set()
        for pattern in self.drop.patterns:
            found = {i for i in self.bpe.added if fnmatch.fnmatchcase(pieces[i], pattern)}
            if not found:
                raise CompressionError(
                    f"--drop-added-tokens {pattern}: no added token of {self.folder.name} matches"
                )
            if found & needed:
                raise CompressionError(
                    f"--drop-added-tokens {pattern}: {pieces[min(found & needed)]!r} is needed, as it "
                    "has a role (bos, eos, pad, unknown) or is put around texts"
                )
            drop |= found
        if self.drop.fillers:
            unused = {i for i in self.bpe.added if counts[i] == 0 and FILLER.fullmatch(pieces[i])}
            drop |= unused - needed
        return drop

    def _producible(
        self, pieces: list[str], parts: list[tuple[int, ...]], merged: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Which pieces a text gives, or a piece that a text gives is made of; bool [vocabulary].

        Of pieces that never occurred, those that the pre-tokenizer cuts, alone and between other characters,
        are taken for ones that no text gives.
        """
        found = np.zeros(len(pieces), dtype=bool)
        for i, piece in enumerate(pieces):
            if merged[i]:
                found[i] = counts[i] > 0 or self._fits(piece)
            elif parts[i]:  # taken whole or not at all
                found[i] = counts[i] > 0 or self._is_pretoken(piece)
        for i in sorted(np.flatnonzero(found), key=lambda i: -len(pieces[i])):
            found[list(parts[i])] = True
        return found

    def _fits(self, piece: str) -> bool:
        """Whether a piece can be in one pre-token."""
        try:
            text = self.bpe.text(-1, piece).decode()
        except UnicodeDecodeError:  # a part of a character, between which nothing is cut
            return True
        return any(
            piece in token for left, right in _AROUND for token in self._pretokens(f"{left}{text}{right}")
        )

    def _is_pretoken(self, piece: str) -> bool:
        """Whether a text that is a piece is not cut."""
        try:
            return self._pretokens(self.bpe.text(-1, piece).decode()) == [piece]
        except UnicodeDecodeError:
            return False

    def _pretokens(self, text: str) -> list[str]:
        normalizer, cutter = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        normalized = normalizer.normalize_str(text) if normalizer else text
        return [token for token, _ in cutter.pre_tokenize_str(normalized)] if cutter else [normalized]

    def choose(self, vocabulary: Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
        """By leaf removal."""
        return choose(vocabulary, counts, vocab_size)

    def compressed(self, kept: np.ndarray, counts: np.ndarray) -> HuggingFaceModel:
        """The tokenizer of the pieces ``kept``."""
        pieces = self.bpe.pieces
        new_id = {old: new for new, old in enumerate(kept.tolist())}
        there = {pieces[i] for i in kept.tolist()}
        last = (self.bpe.derivations[piece][1] for piece in there if piece in self.bpe.vocab)
        merges: set[Pair] = {
            pair for pair in last if pair and there.issuperset(pair) and "".join(pair) in there
        }
        stay = self.tokens - self._dropped(counts.sum(axis=0))
        in_order = sorted(merges, key=self.bpe.ranks.__getitem__)
        description = self.bpe.part(new_id, in_order, stay & self.bpe.added.keys())
        folder = self.folder.part(description, new_id, {pieces[i]: new_id[i] for i in sorted(stay)})
        return HuggingFaceModel(folder, backend=self.backend)

    def unreachable(self) -> list[str]:
        """Pieces that merging their own characters does not give and that are not taken whole."""
        bpe = self.bpe
        model = self.tokenizer.model
        if bpe.ignore_merges:
            model = _loaded(self.folder.tokenizer_json, self.folder.name).model
            model.ignore_merges = False
        dead = []
        for piece, i in bpe.vocab.items():
            if i in bpe.added or bpe.is_byte(piece) or [token.id for token in model.tokenize(piece)] == [i]:
                continue
            if not (bpe.ignore_merges and self._is_pretoken(piece)):
                dead.append(piece)
        return dead

    def round_trip(self, texts: list[str]) -> tuple[int, int]:
        """Tokens of the texts, and the number of texts that do not come back exactly."""
        documents = self.encode_batch(texts)
        back = self.tokenizer.decode_batch(documents, skip_special_tokens=False)
        return sum(map(len, documents)), sum(came != text for came, text in zip(back, texts, strict=True))

    def refuse_others(self, output: str) -> None:
        """Raises if OUTPUT_hf/ holds another tokenizer's files."""
        refuse_others(Path(f"{output}_hf"), self.folder.files)

    def write(self, output: str) -> dict[str, Any]:
        """OUTPUT_hf/."""
        write_folder(Path(f"{output}_hf"), self.folder.files)
        return {}


def _parts(bpe: BpeJson, pieces: list[str]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """What takes the place of each piece, and bool [vocabulary]: whether merging its characters gives it.

    A piece that is only ever taken whole becomes what merging its characters gives.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    parts: list[tuple[int, ...]] = [()] * len(pieces)
    merged = np.zeros(len(pieces), dtype=bool)
    for i, piece in enumerate(pieces):
        if piece not in bpe.vocab or bpe.is_byte(piece):
            continue
        if bpe.byte_level and not BYTE_LEVEL_ALPHABET.keys() >= set(piece):
            continue
        symbols, last = bpe.derivations[piece]
        merged[i] = len(symbols) == 1
        if last and merged[i]:
            parts[i] = ids[last[0]], ids[last[1]]
        elif merged[i]:
            parts[i] = bpe.bytes_of(piece)
        elif bpe.ignore_merges and i not in bpe.added and all(symbol in ids for symbol in symbols):
            parts[i] = tuple(ids[symbol] for symbol in symbols)
    return parts, merged


def _loaded(data: bytes, name: str) -> tokenizers.Tokenizer:
    """The library's tokenizer.

    Raises:
        CompressionError: the library is missing, or does not read it.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise CompressionError("that needs: pip install tokenizers") from error
    try:
        with refusals():
            return tokenizers.Tokenizer.from_str(data.decode())
    except ValueError as error:
        raise CompressionError(f"{name}: the library tokenizers does not read it ({error})") from error


def _require_same_ids(bpe: BpeJson, tokenizer: tokenizers.Tokenizer, name: str) -> None:
    """Raise CompressionError where the library gives a token another id than the file does."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    for i, piece in enumerate(bpe.pieces):
        if known.get(piece) != i:
            raise CompressionError(
                f"{name}: {piece!r} has id {i}, but {known.get(piece)} in the library tokenizers, where "
                "added tokens follow the pieces in the order of their ids"
            )

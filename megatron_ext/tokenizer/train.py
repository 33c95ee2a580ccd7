"""Train a SentencePiece BPE tokenizer on a sample of JSON Lines or parquet files.

The settings are those of Llama's tokenizers: byte fallback (no text is unknown), digits one by one,
no normalisation, spaces kept as they are. Decoding gives text and code back, but for U+2581, which
sentencepiece cannot tell from a blank.
"""

import io
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_ext.common.files import refuse_overwriting, unchanged, write_aside
from megatron_ext.data.text.chunks import chunks
from megatron_ext.data.text.documents import (
    Document,
    Documents,
    LeftOut,
    bad_line_message,
    require_documents,
)
from megatron_ext.data.text.sources import Source, find_sources, refuse_pipes

CHUNK_BYTES = 4 << 20
#: sentencepiece skips longer lines; a longer line of ours is cut.
MAX_LINE_CHARACTERS = 2000
SPECIAL_PIECES = 3 + 256  # <unk> <s> </s> and the bytes
#: Share of a text's characters that get a piece of their own, as in Llama's tokenizers; the rest is bytes.
CHARACTER_COVERAGE = 0.9995


class TrainingTextError(ValueError):
    """The text cannot be read, or is too little for the wanted vocabulary."""


@dataclass(frozen=True)
class Sample:
    """What the tokenizer was trained on."""

    documents: int
    text_bytes: int
    documents_used: int
    text_bytes_used: int
    left_out: LeftOut


def train_tokenizer(
    inputs: list[str],
    output: Path,
    vocab_size: int,
    *,
    key: str,
    sample_bytes: int,
    seed: int,
    on_bad_line: str = "stop",
) -> Sample:
    """Write a BPE model of ``vocab_size`` pieces to ``output``.

    Where the inputs hold more than ``sample_bytes`` of text, documents are drawn at random: the same
    for the same ``seed``.

    ``on_bad_line``: "stop", or "skip", which leaves such lines out.

    Raises:
        TrainingTextError: a line is no JSON object with text at ``key``, or too little text.
        ValueError: an input cannot be opened, changes meanwhile, holds no document, or would be overwritten.
    """
    if vocab_size <= SPECIAL_PIECES:
        raise TrainingTextError(
            f"--vocab-size {vocab_size}: byte fallback alone needs {SPECIAL_PIECES} pieces"
        )
    sources = find_sources(inputs, [output], [key])
    refuse_pipes(sources, "the text is read twice")
    refuse_overwriting([output], [source.path for source in sources])
    with unchanged(source.path for source in sources):
        left_out = LeftOut()
        sizes = [len(text) for text in _texts(sources, key, on_bad_line, left_out)]
        keep = min(1.0, sample_bytes / max(1, sum(sizes)))
        draw = random.Random(seed)
        kept = [draw.random() < keep for _ in sizes]
        used = sum(size for size, wanted in zip(sizes, kept, strict=True) if wanted)

        def texts() -> Iterator[bytes]:
            found = _texts(sources, key, on_bad_line, LeftOut())
            return (text for text, wanted in zip(found, kept, strict=True) if wanted)

        try:
            model = _train(texts, vocab_size)
        except RuntimeError as error:
            raise TrainingTextError(
                f"sentencepiece could not make {vocab_size} pieces from {used} bytes of text: {error}"
            ) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    write_aside(output, model)
    return Sample(len(sizes), sum(sizes), sum(kept), used, left_out)


def _train(texts: Callable[[], Iterator[bytes]], vocab_size: int) -> bytes:
    """The model file; ``texts`` is read twice.

    sentencepiece gives every character a piece, or refuses. A Chinese text has more characters than
    a small vocabulary has pieces, so text is cut at the rare ones, which become bytes.
    """
    cut = dict.fromkeys(map(ord, rare_characters(texts(), (vocab_size - SPECIAL_PIECES) // 2)), "\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts() for line in _lines(text.decode("utf-8").translate(cut))),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * MAX_LINE_CHARACTERS,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def rare_characters(texts: Iterable[bytes], most: int) -> set[str]:
    """All characters but the most frequent ones that cover 99.95 % of the text, of which at most ``most``."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.decode("utf-8"))
    wanted, covered, rare = CHARACTER_COVERAGE * sum(counts.values()), 0, set()
    for rank, (character, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
        if rank >= most or covered >= wanted:
            rare.add(character)
        covered += count
    return rare


def _texts(sources: list[Source], key: str, on_bad_line: str, left_out: LeftOut) -> Iterator[bytes]:
    """The text of every document; those of a list are joined as lines."""
    found = [0] * len(sources)
    for chunk in chunks(sources, CHUNK_BYTES):
        for document in Documents(chunk, [key]):
            found[chunk.source] += 1
            if isinstance(document, Document):
                yield b"\n".join(document.texts[0])
            elif on_bad_line == "stop":
                raise TrainingTextError(bad_line_message(chunk, document.place, document.reason, "skip"))
            else:
                left_out.add(chunk, document.place, document.reason)
    require_documents(sources, found, on_bad_line)


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_LINE_CHARACTERS):
            yield line[start : start + MAX_LINE_CHARACTERS]

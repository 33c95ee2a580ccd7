"""tools/compress_tokenizer.py from flags to files."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import refuse_overwriting
from megatron_ext.common.progress import Progress
from megatron_ext.config.presets import PRESETS
from megatron_ext.data.indexed import dataset_files
from megatron_ext.data.text.chunks import chunks
from megatron_ext.data.text.documents import Document, Documents, LeftOut, bad_line_message
from megatron_ext.data.text.sources import STDIN, Source, find_sources, refuse_pipes
from megatron_ext.tokenizer import compress_report
from megatron_ext.tokenizer.compress import Compressible, CompressionError, TextEncoder, Vocabulary
from megatron_ext.tokenizer.compress_huggingface import Drop, HuggingFaceModel
from megatron_ext.tokenizer.compress_sentencepiece import SentencePieceModel
from megatron_ext.tokenizer.counts import CHUNK_BYTES, Counts, count_dataset, count_text, group_name
from megatron_ext.tokenizer.hf_folder import COMPANIONS, DESCRIPTION, HuggingFaceFolder
from megatron_ext.tokenizer.idmap import IdMap
from megatron_ext.tokenizer.tiktoken_file import FAMILIES, as_folder, family_of, is_tiktoken

#: What OUTPUT_hf may hold.
HF_FILES = (DESCRIPTION, *COMPANIONS, "tokenizer.model")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """A compression.

    Attributes:
        tokenizer_model: SentencePiece model, Hugging Face folder, tokenizer.json or .tiktoken file.
        input, validation: JSON lines to count, and held-out ones for the report: files, globs, folders.
        dataset: prefixes of datasets made with the full model.
        counts: files of counts that earlier runs saved.
        vocab_size: pieces of the new model; None only counts.
        output: PREFIX of PREFIX.model and so on.
        on_bad_line: "stop" or "skip".
        drop_fillers: let tokens that look like fillers and never occur go.
        drop_added_tokens: shell patterns of added tokens that shall go; of Hugging Face tokenizers.
        tiktoken_family, split_pattern, special_tokens: what a .tiktoken file does not say.
        tokenizer_backend: what encodes with a Hugging Face tokenizer, one of ``encoding.BACKENDS``.
        report: folder of the report.
        model_preset: whose share of embedding and head the report shows.
    """

    tokenizer_model: str
    output: str
    vocab_size: int | None = None
    input: Sequence[str] = ()
    dataset: Sequence[str] = ()
    counts: Sequence[str] = ()
    validation: Sequence[str] = ()
    json_key: str = "text"
    on_bad_line: str = "stop"
    drop_fillers: bool = False
    drop_added_tokens: Sequence[str] = ()
    tiktoken_family: str | None = None
    split_pattern: str | None = None
    special_tokens: Sequence[str] = ()
    tokenizer_backend: str = "auto"
    workers: int = 1
    report: str | None = None
    model_preset: str = "pangu-pi-1b-pro"

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        found = []
        if not (self.input or self.dataset or self.counts):
            found.append("nothing to count: give --input, --dataset or --counts")
        if self.vocab_size is not None and self.vocab_size < 1:
            found.append("--vocab-size must be 1 or more")
        if self.workers < 1:
            found.append("--workers must be 1 or more")
        if self.vocab_size is None and self.report:
            found.append("--report needs --vocab-size")
        if self.vocab_size is None and self.drop_fillers:
            found.append("--drop-fillers needs --vocab-size")
        if self.vocab_size is None and self.drop_added_tokens:
            found.append("--drop-added-tokens needs --vocab-size")
        if self.tiktoken_family is not None and self.tiktoken_family not in FAMILIES:
            found.append(f"--tiktoken-family {self.tiktoken_family}: not one of {', '.join(FAMILIES)}")
        if self.tiktoken_family is not None and (self.split_pattern is not None or self.special_tokens):
            found.append("--tiktoken-family says what --split-pattern and --special-tokens say: give one")
        if self.special_tokens and self.split_pattern is None and self.tiktoken_family is None:
            found.append("--special-tokens needs --split-pattern")
        if self.validation and not self.report:
            found.append("--validation needs --report")
        if self.model_preset not in PRESETS:
            found.append(f"--model-preset {self.model_preset}: not one of {', '.join(PRESETS)}")
        return found


def compress(options: CompressOptions) -> dict[str, Any]:
    """Counts, chooses, writes; the summary of what was done.

    Raises:
        ValueError: bad input; names the file and what to do.
    """
    started = time.monotonic()
    files = Files.of(options)
    full = read_tokenizer(options)
    old_size = full.encoder.vocab_size
    if options.vocab_size is not None and options.vocab_size > old_size:
        raise CompressionError(
            f"--tokenizer-model {options.tokenizer_model} has {old_size} pieces, fewer than the "
            f"{options.vocab_size} asked for"
        )
    if options.vocab_size is not None:
        full.refuse_others(options.output)
        if isinstance(full, HuggingFaceModel) and not full.folder.ends_documents:
            say(
                f"WARNING: {full.folder.name} names no eos_token in a tokenizer_config.json, nor will the "
                "result: preprocessing and training need one to end documents"
            )
    counts, left_out = gather(options, files, full)
    Path(options.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    if not files.only_own_counts:
        counts.save(files.own_counts)
    summary: dict[str, Any] = {
        "old_size": old_size,
        "counted_tokens": int(counts.total.sum()),
        "counted_bytes": int(counts.text_bytes.sum()),
        "left_out": left_out.count,
    }
    if options.vocab_size is None:
        return summary | {"seconds": round(time.monotonic() - started, 2)}
    vocabulary = full.vocabulary(counts.total)
    kept = full.choose(vocabulary, counts.counts, options.vocab_size)
    new = full.compressed(kept, counts.counts)
    if dead := new.unreachable():
        raise AssertionError(f"{len(dead)} pieces of the new model cannot be produced: {dead[:5]}")
    say(f"{len(kept):,} of {old_size:,} pieces stay")
    summary |= {
        "new_size": len(kept),
        "unreachable_before": int((vocabulary.dead & ~vocabulary.fixed).sum()),
        "unreachable_after": 0,
        "coverage": float(counts.total[kept].sum() / max(counts.total.sum(), 1)),
    }
    summary |= write_files(options.output, new, IdMap.of_kept(kept, old_size, full.sha256, new.sha256))
    if options.input:
        summary["measured"] = measure(options, files, new, int(counts.total.sum()))
    if options.report:
        texts = held_out(files.validation, options.json_key, options.on_bad_line)
        summary["recommended"] = report(options, summary, vocabulary, counts, kept, (full, new), texts)
    return summary | {"seconds": round(time.monotonic() - started, 2)}


def read_tokenizer(options: CompressOptions) -> Compressible:
    """The tokenizer of --tokenizer-model, whatever its kind.

    Raises:
        ValueError: it cannot be read or compressed, or a flag does not go with its kind.
    """
    path = Path(options.tokenizer_model)
    data = b"" if path.is_dir() else path.read_bytes()
    drop = Drop(options.drop_fillers, options.drop_added_tokens)
    tiktoken = path.suffix == ".tiktoken" or is_tiktoken(data)
    if not tiktoken and (options.tiktoken_family is not None or options.split_pattern is not None):
        raise CompressionError(
            f"--tiktoken-family and --split-pattern are for .tiktoken files, which {path} is not"
        )
    if tiktoken:
        family = family_of(options.tiktoken_family, options.split_pattern, options.special_tokens)
        return HuggingFaceModel(as_folder(path, data, family), drop, options.tokenizer_backend)
    if path.is_dir() or path.suffix == ".json" or data.lstrip()[:1] == b"{":
        return HuggingFaceModel(HuggingFaceFolder.read(path), drop, options.tokenizer_backend)
    if options.drop_added_tokens:
        raise CompressionError(f"--drop-added-tokens: a SentencePiece model has none; {path} is one")
    return SentencePieceModel(data, options.drop_fillers, options.tokenizer_model)


@dataclass(frozen=True)
class Files:
    """What is read and what is written, none of which is both.

    Attributes:
        own_counts: where the counts are written.
        only_own_counts: nothing is counted anew, and what is read are these counts.
    """

    inputs: list[Source]
    validation: list[Source]
    own_counts: Path
    only_own_counts: bool

    @classmethod
    def of(cls, options: CompressOptions) -> Files:
        """Those that the flags name.

        Raises:
            ValueError: an input is not there, would be overwritten, or is a pipe that is to be read twice.
        """
        counts = Path(f"{options.output}.counts.npz")
        produced = produced_files(options.output, options.report)
        inputs = find_sources(options.input, [*produced, counts], [options.json_key])
        validation = find_sources(options.validation, [*produced, counts], [options.json_key])
        if options.vocab_size is not None:
            refuse_pipes(inputs, "the text is read twice")
        only_own = (
            not options.input and not options.dataset and [Path(name) for name in options.counts] == [counts]
        )
        datasets = [path for prefix in options.dataset for path in dataset_files(prefix)]
        texts = [source.path for source in [*inputs, *validation] if source.path != STDIN]
        read: list[str | Path] = [*tokenizer_files(Path(options.tokenizer_model)), *texts, *datasets]
        refuse_overwriting([*produced, counts], read if only_own else [*read, *options.counts])
        return cls(inputs, validation, counts, only_own)


def produced_files(output: str, report: str | None) -> list[Path]:
    """What is written besides the counts."""
    endings = (".model", ".vocab", ".idmap.npz", ".idmap.json")
    files = [Path(f"{output}{ending}") for ending in endings]
    files += [Path(f"{output}_hf", name) for name in HF_FILES]
    return files + [Path(report, f"report.{ending}") for ending in ("md", "json", "png") if report]


def tokenizer_files(path: Path) -> list[Path]:
    """A tokenizer's file, or the files of its folder that are read."""
    folder = path if path.is_dir() else path.parent if path.name == DESCRIPTION else None
    return [folder / name for name in (DESCRIPTION, *COMPANIONS)] if folder else [path]


def gather(options: CompressOptions, files: Files, full: Compressible) -> tuple[Counts, LeftOut]:
    """The counts of everything that --input, --dataset and --counts name."""
    counts, left_out = Counts.empty(full.sha256, full.encoder.vocab_size), LeftOut()
    for name in options.counts:
        counts.merge(Counts.load(name), name)
    for prefix in options.dataset:
        counts.merge(count_dataset(prefix, full.token_bytes(), full.sha256))
    if files.inputs:
        found, left_out = counted(options, files, full.encoder, full.sha256)
        counts.merge(found)
    if counts.total.sum() == 0:
        raise CompressionError("the input holds no tokens; nothing says which pieces matter")
    say(f"counted {int(counts.total.sum()):,} tokens in {int(counts.text_bytes.sum()):,} bytes")
    if left_out.count:
        say(str(left_out))
    return counts, left_out


def counted(
    options: CompressOptions, files: Files, encoder: TextEncoder, digest: str
) -> tuple[Counts, LeftOut]:
    """The text of --input, counted with progress."""
    with Progress("counting", None, "B") as progress:
        return count_text(
            files.inputs, encoder, digest, options.workers, options.json_key, options.on_bad_line, progress
        )


def measure(options: CompressOptions, files: Files, new: Compressible, before: int) -> dict[str, Any]:
    """Tokens of --input with the new model."""
    say("counting again with the new model")
    after = int(counted(options, files, new.encoder, "")[0].total.sum())
    counted_elsewhere = bool(options.counts or options.dataset)
    return {"tokens": after} | ({} if counted_elsewhere else {"more_tokens": after / before - 1})


def write_files(output: str, new: Compressible, ids: IdMap) -> dict[str, Any]:
    """OUTPUT.idmap.npz and .json, and what the tokenizer consists of; what the summary shall say of it."""
    ids.save(f"{output}.idmap.npz")
    ids.save(f"{output}.idmap.json")
    written = new.write(output)
    if reason := written.get("no_hf_folder"):
        say(f"WARNING: {output}_hf is left out, for transformers cannot do what the model does: {reason}")
    return written


def report(
    options: CompressOptions,
    summary: dict[str, Any],
    vocabulary: Vocabulary,
    counts: Counts,
    kept: np.ndarray,
    tokenizers: tuple[Compressible, Compressible],
    texts: dict[str, list[str]],
) -> dict[str, Any]:
    """Writes everything of --report; the sizes recommended."""
    points = compress_report.curve(vocabulary, counts, [*compress_report.SIZES, len(kept)])
    compress_report.add_shares(points, options.model_preset)
    facts: dict[str, Any] = {
        "model_preset": options.model_preset,
        "curve": points,
        "recommended": compress_report.recommend(points),
        "examples": compress_report.examples(vocabulary, counts.total, kept),
        "held_out": compress_report.compare(*tokenizers, texts),
    }
    compress_report.write(summary | facts, Path(options.report or ""))
    return facts["recommended"]


def held_out(sources: list[Source], key: str, on_bad_line: str) -> dict[str, list[str]]:
    """Texts of --validation by file and source.

    Raises:
        ValueError: a line cannot be used and ``on_bad_line`` is "stop".
    """
    documents: dict[str, list[str]] = {}
    for chunk in chunks(sources, CHUNK_BYTES):
        for document in Documents(chunk, [key]):
            if isinstance(document, Document):
                texts = documents.setdefault(group_name(chunk.path, document.source), [])
                texts += [text.decode() for text in document.texts[0]]
            elif on_bad_line == "stop":
                raise ValueError(bad_line_message(chunk, document.place, document.reason, "skip"))
    return documents

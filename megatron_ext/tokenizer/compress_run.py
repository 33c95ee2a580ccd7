"""tools/compress_tokenizer.py from flags to files."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import refuse_overwriting, sha256, write_aside
from megatron_ext.common.progress import Progress
from megatron_ext.config.presets import PRESETS
from megatron_ext.data.indexed import dataset_files
from megatron_ext.data.text.chunks import chunks
from megatron_ext.data.text.documents import Document, Documents, LeftOut, bad_line_message
from megatron_ext.data.text.sources import STDIN, Source, find_sources, refuse_pipes
from megatron_ext.tokenizer import compress_report, hf_export
from megatron_ext.tokenizer.compress import (
    UNIGRAM,
    CompressionError,
    Vocabulary,
    choose,
    choose_unigram,
    describe,
    pruned_model,
    read_proto,
    unigram_scores,
    unreachable,
)
from megatron_ext.tokenizer.counts import CHUNK_BYTES, Counts, count_dataset, count_text, group_name
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.idmap import IdMap

#: What OUTPUT_hf holds.
HF_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """A compression.

    Attributes:
        input, validation: JSON lines to count, and held-out ones for the report: files, globs, folders.
        dataset: prefixes of datasets made with the full model.
        counts: files of counts that earlier runs saved.
        vocab_size: pieces of the new model; None only counts.
        output: PREFIX of PREFIX.model and so on.
        on_bad_line: "stop" or "skip".
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
    data = Path(options.tokenizer_model).read_bytes()
    encoder, proto = NativeEncoder(options.tokenizer_model, model_proto=data), read_proto(data)
    if options.vocab_size is not None and options.vocab_size > encoder.vocab_size:
        raise CompressionError(
            f"--tokenizer-model {options.tokenizer_model} has {encoder.vocab_size} pieces, fewer than the "
            f"{options.vocab_size} asked for"
        )
    counts, left_out = gather(options, files, encoder, sha256(data))
    Path(options.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    if not files.only_own_counts:
        counts.save(files.own_counts)
    summary: dict[str, Any] = {
        "old_size": encoder.vocab_size,
        "counted_tokens": int(counts.total.sum()),
        "counted_bytes": int(counts.text_bytes.sum()),
        "left_out": left_out.count,
    }
    if options.vocab_size is None:
        return summary | {"seconds": round(time.monotonic() - started, 2)}
    vocabulary = describe(proto, encoder, options.drop_fillers, counts.total)
    is_unigram = proto.trainer_spec.model_type == UNIGRAM
    kept = (choose_unigram if is_unigram else choose)(vocabulary, counts.counts, options.vocab_size)
    scores = unigram_scores(proto, counts.counts, kept) if is_unigram else None
    new_data = pruned_model(proto, kept, scores).SerializeToString()
    new = NativeEncoder(model_proto=new_data)
    if not is_unigram and (dead := unreachable(new)):
        raise AssertionError(f"{len(dead)} pieces of the new model cannot be produced: {dead[:5]}")
    say(f"{len(kept):,} of {encoder.vocab_size:,} pieces stay")
    summary |= {
        "new_size": len(kept),
        "unreachable_before": int((vocabulary.dead & ~vocabulary.fixed).sum()),
        "unreachable_after": 0,
        "coverage": float(counts.total[kept].sum() / max(counts.total.sum(), 1)),
    }
    ids = IdMap.of_kept(kept, encoder.vocab_size, sha256(data), sha256(new_data))
    if reason := write_files(options.output, new_data, new, ids):
        summary["no_hf_folder"] = reason
    if options.input:
        summary["measured"] = measure(options, files, new, int(counts.total.sum()))
    if options.report:
        texts = held_out(files.validation, options.json_key, options.on_bad_line)
        summary["recommended"] = report(
            Path(options.report),
            options.model_preset,
            summary,
            vocabulary,
            counts,
            kept,
            (encoder, new),
            texts,
        )
    return summary | {"seconds": round(time.monotonic() - started, 2)}


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
        read: list[str | Path] = [options.tokenizer_model, *texts, *datasets]
        refuse_overwriting([*produced, counts], read if only_own else [*read, *options.counts])
        return cls(inputs, validation, counts, only_own)


def produced_files(output: str, report: str | None) -> list[Path]:
    """What is written besides the counts."""
    endings = (".model", ".vocab", ".idmap.npz", ".idmap.json")
    files = [Path(f"{output}{ending}") for ending in endings]
    files += [Path(f"{output}_hf", name) for name in HF_FILES]
    return files + [Path(report, f"report.{ending}") for ending in ("md", "json", "png") if report]


def gather(
    options: CompressOptions, files: Files, encoder: NativeEncoder, digest: str
) -> tuple[Counts, LeftOut]:
    """The counts of everything that --input, --dataset and --counts name."""
    counts, left_out = Counts.empty(digest, encoder.vocab_size), LeftOut()
    for name in options.counts:
        counts.merge(Counts.load(name), name)
    for prefix in options.dataset:
        counts.merge(count_dataset(prefix, encoder, digest))
    if files.inputs:
        found, left_out = counted(options, files, encoder, digest)
        counts.merge(found)
    if counts.total.sum() == 0:
        raise CompressionError("the input holds no tokens; nothing says which pieces matter")
    say(f"counted {int(counts.total.sum()):,} tokens in {int(counts.text_bytes.sum()):,} bytes")
    if left_out.count:
        say(str(left_out))
    return counts, left_out


def counted(
    options: CompressOptions, files: Files, encoder: NativeEncoder, digest: str
) -> tuple[Counts, LeftOut]:
    """The text of --input, counted with progress."""
    with Progress("counting", None, "B") as progress:
        return count_text(
            files.inputs, encoder, digest, options.workers, options.json_key, options.on_bad_line, progress
        )


def measure(options: CompressOptions, files: Files, new: NativeEncoder, before: int) -> dict[str, Any]:
    """Tokens of --input with the new model."""
    say("counting again with the new model")
    after = int(counted(options, files, new, "")[0].total.sum())
    counted_elsewhere = bool(options.counts or options.dataset)
    return {"tokens": after} | ({} if counted_elsewhere else {"more_tokens": after / before - 1})


def write_files(output: str, model: bytes, new: NativeEncoder, ids: IdMap) -> str | None:
    """OUTPUT.model, .vocab, .idmap.npz, .idmap.json and OUTPUT_hf/; or why the last is left out."""
    ids.save(f"{output}.idmap.npz")
    ids.save(f"{output}.idmap.json")
    processor = new.processor
    lines = [f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(new.vocab_size)]
    write_aside(Path(f"{output}.vocab"), "".join(lines).encode())
    left_out = write_hf_folder(Path(f"{output}_hf"), model, new)
    write_aside(Path(f"{output}.model"), model)
    return left_out


def write_hf_folder(folder: Path, model: bytes, new: NativeEncoder) -> str | None:
    """OUTPUT_hf/; or the reason why there is none.

    Raises:
        CompressionError: there is none, but a folder of that name, which is another model's.
    """
    try:
        files = hf_export.folder_files(new, model)
    except hf_export.NotExpressible as error:
        if folder.exists():
            raise CompressionError(
                f"{folder} is of another model, and this one cannot be described for transformers ({error}); "
                "remove it"
            ) from error
        say(f"WARNING: {folder} is left out, for transformers cannot do what the model does: {error}")
        return str(error)
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        write_aside(folder / name, content)
    return None


def report(
    folder: Path,
    model_preset: str,
    summary: dict[str, Any],
    vocabulary: Vocabulary,
    counts: Counts,
    kept: np.ndarray,
    encoders: tuple[NativeEncoder, NativeEncoder],
    texts: dict[str, list[str]],
) -> dict[str, Any]:
    """Writes everything of --report into ``folder``; the sizes recommended."""
    points = compress_report.curve(vocabulary, counts, [*compress_report.SIZES, len(kept)])
    compress_report.add_shares(points, model_preset)
    facts: dict[str, Any] = {
        "model_preset": model_preset,
        "curve": points,
        "recommended": compress_report.recommend(points),
        "examples": compress_report.examples(vocabulary, counts.total, kept),
        "held_out": compress_report.compare(*encoders, texts),
    }
    compress_report.write(summary | facts, folder)
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

"""tools/compress_tokenizer.py from flags to files."""

from __future__ import annotations

import hashlib
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

from megatron_ext.data.files import write_aside
from megatron_ext.data.preprocess.progress import Progress
from megatron_ext.data.preprocess.sources import chunks, find_sources
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
from megatron_ext.tokenizer.counts import CHUNK_BYTES, Counts, count_dataset, count_text, read_documents
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.idmap import IdMap


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def sha256(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def compress(args: Namespace) -> dict:
    """Counts, chooses, writes; the summary of what was done. ``args``: see the tool.

    Raises:
        ValueError: bad input; names the file and what to do.
    """
    started = time.monotonic()
    data = Path(args.tokenizer_model).read_bytes()
    proto, encoder = read_proto(data), NativeEncoder(args.tokenizer_model)
    Path(args.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    counts = gather(args, encoder, sha256(data))
    counts.save(f"{args.output}.counts.npz")
    summary = {
        "old_size": encoder.vocab_size,
        "counted_tokens": int(counts.total.sum()),
        "counted_bytes": int(counts.text_bytes.sum()),
    }
    if args.vocab_size is None:
        return summary | {"seconds": round(time.monotonic() - started, 2)}
    vocabulary = describe(proto, encoder, args.drop_fillers, counts.total)
    is_unigram = proto.trainer_spec.model_type == UNIGRAM
    kept = (choose_unigram if is_unigram else choose)(vocabulary, counts.counts, args.vocab_size)
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
    if left_out := write_files(args.output, new_data, new, ids):
        summary["no_hf_folder"] = left_out
    if args.input:
        summary["measured"] = measure(args, new, int(counts.total.sum()))
    if args.report:
        summary["recommended"] = report(args, summary, vocabulary, counts, kept, (encoder, new))
    return summary | {"seconds": round(time.monotonic() - started, 2)}


def gather(args: Namespace, encoder: NativeEncoder, digest: str) -> Counts:
    """The counts of everything that --input, --dataset and --counts name."""
    counts = Counts.empty(digest, encoder.vocab_size)
    for name in args.counts:
        counts.merge(Counts.load(name), name)
    for prefix in args.dataset:
        counts.merge(count_dataset(prefix, encoder, digest))
    if args.input:
        counts.merge(counted(args, encoder, digest))
    if counts.total.sum() == 0:
        raise CompressionError("the input holds no tokens; nothing says which pieces matter")
    say(f"counted {int(counts.total.sum()):,} tokens in {int(counts.text_bytes.sum()):,} bytes")
    return counts


def counted(args: Namespace, encoder: NativeEncoder, digest: str) -> Counts:
    """The text of --input, counted with progress."""
    progress = Progress(None, log_interval=1000)
    try:
        return count_text(args.input, encoder, digest, args.workers, args.json_key, progress)
    finally:
        progress.close()


def measure(args: Namespace, new: NativeEncoder, before: int) -> dict:
    """Tokens of --input with the new model."""
    say("counting again with the new model")
    after = int(counted(args, new, "").total.sum())
    counted_elsewhere = bool(args.counts or args.dataset)
    return {"tokens": after} | ({} if counted_elsewhere else {"more_tokens": after / before - 1})


def write_files(output: str, model: bytes, new: NativeEncoder, ids: IdMap) -> str | None:
    """OUTPUT.model, .vocab, .idmap.npz, .idmap.json and OUTPUT_hf/; or why the last is left out."""
    ids.save(f"{output}.idmap.npz")
    ids.save(f"{output}.idmap.json")
    processor = new.processor
    lines = [f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(new.vocab_size)]
    write_aside(Path(f"{output}.vocab"), lambda file: file.write("".join(lines).encode()))
    left_out = write_hf_folder(Path(f"{output}_hf"), model, new)
    write_aside(Path(f"{output}.model"), lambda file: file.write(model))
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
        write_aside(folder / name, lambda file, content=content: file.write(content))
    return None


def report(
    args: Namespace,
    summary: dict,
    vocabulary: Vocabulary,
    counts: Counts,
    kept: np.ndarray,
    encoders: tuple[NativeEncoder, NativeEncoder],
) -> dict:
    """Writes everything of --report; the sizes recommended."""
    points = compress_report.curve(vocabulary, counts, [*compress_report.SIZES, args.vocab_size])
    compress_report.add_shares(points, args.model_preset)
    facts = {
        "model_preset": args.model_preset,
        "curve": points,
        "recommended": compress_report.recommend(points),
        "examples": compress_report.examples(vocabulary, counts.total, kept),
        "held_out": compress_report.compare(*encoders, held_out(args)),
    }
    compress_report.write(summary | facts, Path(args.report))
    return facts["recommended"]


def held_out(args: Namespace) -> dict[str, list[str]]:
    """Texts of --validation by file and source."""
    documents: dict[str, list[str]] = {}
    for chunk in chunks(find_sources(args.validation), CHUNK_BYTES):
        stem = Path(chunk.path).name.split(".")[0]
        for source, text in read_documents(chunk, args.json_key):
            documents.setdefault(f"{stem}/{source}" if source else stem, []).append(text)
    return documents

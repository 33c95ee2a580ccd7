"""A whole preprocessing run: plan, parts, dataset; resumable at every moment."""

import functools
import os
from collections.abc import Iterator
from typing import Any

from megatron_ext.common.files import InputChanged, refuse_overwriting
from megatron_ext.common.progress import Progress
from megatron_ext.data.indexed import optimal_dtype
from megatron_ext.data.manifest import read_manifest, refuse_replacing_others
from megatron_ext.data.text.chunks import Chunk, chunks, count_lines, units
from megatron_ext.data.text.documents import NoDocuments, bad_line_message, require_documents
from megatron_ext.data.text.inputs import InputCheck
from megatron_ext.data.text.pool import Failure, run_chunks
from megatron_ext.data.text.sources import Source, find_sources, refuse_pipes
from megatron_ext.data.writer import publish
from megatron_ext.preprocess import assemble
from megatron_ext.preprocess.options import Options, PreprocessError, chunk_size, plan_id
from megatron_ext.preprocess.work_folder import work_folder
from megatron_ext.preprocess.worker import Part, Recipe, process, read_part
from megatron_ext.tokenizer import encoding
from megatron_ext.tokenizer.build import Tokenizer
from megatron_ext.tokenizer.hf_vocabulary import require_vocabulary


def preprocess(options: Options, quiet: bool = False) -> dict[str, Any]:
    """Write ``PREFIX_KEY_document.bin/.idx/.json`` for each key; the summary of the run.

    Killed at any moment, the same call goes on where it was and gives the same bytes. Memory is
    about 100 MB a worker, 16 times the longest line, one chunk of a compressed input a worker, and
    28 bytes a document (76 with dedup).

    Raises:
        PreprocessError: the input cannot be used; nothing is left behind.
        InputChanged: an input was written to meanwhile.
        OSError: a file cannot be read or written.
        ValueError: the tokenizer cannot be built, an input is not there or would be overwritten.
        WorkerFailed: a worker died; what is finished is kept.
    """
    sources = find_sources(options.inputs, options.produced(), options.json_keys)
    if options.shard is not None:
        refuse_pipes(sources, "--shard divides the input")
    refuse_overwriting(options.produced(), options.files_read(sources))
    for key in options.json_keys:
        refuse_replacing_others(options.dataset(key))
    tokenizer, _ = encoding.load(options.tokenizer, options.tokenizer_backend)
    require_vocabulary(tokenizer, options.tokenizer.tokenizer_model, options.append_eod)
    plan = plan_id(options, sources, tokenizer.sha256)
    finished = _finished(options, sources, plan)
    if finished is not None:
        return finished | {"already_done": True}
    sizes = [source.bytes for source in sources if source.bytes is not None]
    size = sum(sizes) if len(sizes) == len(sources) and options.shard is None else None
    with (
        Progress("preprocessing", size, "B", quiet=quiet, log_interval=options.log_interval) as progress,
        work_folder(options.work_folder, plan, progress) as lock,
    ):
        return _Run(options, sources, tokenizer, plan, progress, lock).run()


def _finished(options: Options, sources: list[Source], plan: str) -> dict[str, Any] | None:
    """The summary of an earlier run that did the very same, if its files are all there."""
    if any(source.bytes is None for source in sources):
        return None
    summary: dict[str, Any] = {"datasets": {}}
    for key in options.json_keys:
        prefix = options.dataset(key)
        try:
            manifest = read_manifest(prefix)
            sizes = {suffix: os.path.getsize(f"{prefix}.{suffix}") for suffix in ("bin", "idx")}
        except (ValueError, OSError):
            return None
        if manifest is None or manifest.get("plan") != plan:
            return None
        if any(manifest["files"][suffix]["bytes"] != size for suffix, size in sizes.items()):
            return None
        summary["datasets"][prefix] = manifest
    return summary


class _Run:
    """The state of one run."""

    def __init__(
        self,
        options: Options,
        sources: list[Source],
        tokenizer: Tokenizer,
        plan: str,
        progress: Progress,
        lock: int,
    ) -> None:
        self.options, self.sources, self.tokenizer = options, sources, tokenizer
        self.plan, self.progress, self.lock = plan, progress, lock
        self.folder = options.work_folder
        self.parts: dict[int, Part] = {}
        self.reused = 0
        self.chunk_bytes = chunk_size(options, sources)
        mine = units(sources, self.chunk_bytes, options.shard)
        self.check = InputCheck(sources, mine, self.chunk_bytes, options.json_keys)

    def run(self) -> dict[str, Any]:
        recipe = Recipe(
            self.folder,
            tuple(self.options.json_keys),
            self.tokenizer.eod if self.options.append_eod else None,
            self.options.on_bad_line,
            self.options.dedup,
        )
        _, encoder = encoding.load(self.options.tokenizer, self.options.tokenizer_backend)
        work = functools.partial(process, recipe=recipe, encoder=encoder)
        failure = run_chunks(self._chunks_to_do(), self.options.workers, work, self._done, self.lock)
        if failure is not None:
            raise self._stopped(failure)
        parts = [self.parts[number] for number in sorted(self.parts)]
        inputs = self._inputs()
        empty = self._check_documents(parts)
        return self._assemble(parts, inputs, empty)

    def _chunks_to_do(self) -> Iterator[Chunk]:
        """The chunks, without those that an earlier run finished."""
        self.check.start()  # not before: processes are forked from one thread
        for chunk in chunks(self.sources, self.chunk_bytes, self.options.shard):
            part = read_part(self.folder, chunk.number)
            if part is not None and (part.source, part.fingerprint) == (chunk.source, chunk.fingerprint()):
                self.reused += 1
                self._done(chunk, part, reused=True)
            else:
                yield chunk

    def _done(self, chunk: Chunk, part: Part, reused: bool = False) -> None:
        self.parts[part.number] = part
        self.check.add(chunk, part.digest)
        if reused:
            self.progress.skip(chunk.size)
        else:
            self.progress.add_text(chunk.size, part.bytes, part.documents, sum(part.tokens.values()))

    def _stopped(self, failure: Failure) -> PreprocessError:
        chunk = failure.chunk
        self.check.require_unchanged(chunk.source)  # a line may be cut off because its file was
        ways = "skip or quarantine"
        return PreprocessError(bad_line_message(chunk, failure.line, failure.reason, ways, failure.remedy))

    def _inputs(self) -> list[dict[str, Any]]:
        """What the manifest says of the inputs; parts of other content must not be found again."""
        try:
            return self.check.finish()
        except InputChanged as error:
            raise PreprocessError(str(error)) from error

    def _lines_of_other_shards(self, source: int) -> int:
        if self.options.shard is None or self.sources[source].kind != "plain":
            return 0
        mine = units(self.sources, self.chunk_bytes, self.options.shard)
        begin = next(unit.begin for unit in mine if unit.source == source)
        return count_lines(self.sources[source].path, begin)

    def _check_documents(self, parts: list[Part]) -> list[str]:
        """Names of the inputs without documents; an error where bad input is one."""
        found = dict.fromkeys(range(len(self.sources)), 0)
        for part in parts:
            found[part.source] += part.documents + part.bad_lines
        if self.options.shard is not None:
            return []
        try:
            empty = require_documents(self.sources, list(found.values()), self.options.on_bad_line)
        except NoDocuments as error:
            raise PreprocessError(str(error)) from None
        if not any(part.documents for part in parts):
            raise PreprocessError(f"{self.sources[0].path}: no line can be used. Nothing was written")
        return empty

    def _assemble(self, parts: list[Part], inputs: list[dict[str, Any]], empty: list[str]) -> dict[str, Any]:
        options, dtype = self.options, optimal_dtype(self.tokenizer.vocab_size)
        keep = assemble.first_of_equals(parts, self.folder) if options.dedup else None
        datasets = [
            assemble.build(options.dataset(key), which, parts, self.folder, dtype, keep)
            for which, key in enumerate(options.json_keys)
        ]
        bad = sum(part.bad_lines for part in parts) + len(empty)
        options.bad_lines_file.unlink(missing_ok=True)
        if bad:
            self._write_bad_lines(parts, empty)
        common = {
            "dtype": dtype.name,
            "tokenizer": {
                "type": options.tokenizer.tokenizer_type,
                "name": os.path.basename(str(options.tokenizer.tokenizer_model or "")) or None,
                "sha256": self.tokenizer.sha256,
                "vocab_size": self.tokenizer.vocab_size,
                "eod": self.tokenizer.eod,
            },
            "encoders": encoders_of(parts),
            "options": options.describe(),
            "inputs": inputs,
            "lines": {
                "read": sum(part.lines for part in parts),
                "blank": sum(part.blank_lines for part in parts),
                "dropped": bad,
                "duplicates": 0 if keep is None else int((~keep).sum()),
                "empty_documents": sum(part.empty_documents for part in parts),
                "text_bytes": sum(part.bytes for part in parts),
            },
            "bad_lines_file": options.bad_lines_file.name if bad else None,
            "plan": self.plan,
        }
        seconds = round(self.progress.seconds(), 3)
        summary: dict[str, Any] = {"datasets": {}, "seconds": seconds, "parts_reused": self.reused}
        for built in datasets:
            publish(built, common)
            summary["datasets"][built.prefix] = built.counts() | common
        return summary

    def _write_bad_lines(self, parts: list[Part], empty: list[str]) -> None:
        first, line, source = {}, 0, None
        for part in parts:
            if part.source != source:
                source, line = part.source, self._lines_of_other_shards(part.source)
            first[part.number] = line + 1
            line += part.lines
        names = [source.path for source in self.sources]
        assemble.write_bad_lines(
            self.options.bad_lines_file, parts, self.folder, names, lambda part: first[part.number], empty
        )


def encoders_of(parts: list[Part]) -> list[dict[str, Any]]:
    """The parts' encoders with their counts added up: one, unless a run was resumed with another version."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        entry = entries.setdefault(
            (part.encoder["name"], str(part.encoder["compared_with"])),
            part.encoder | {"texts": 0, "texts_compared": 0},
        )
        for count in ("texts", "texts_compared"):
            entry[count] += part.encoder[count]
    return list(entries.values())


def describe(summary: dict[str, Any]) -> str:
    """The summary for people, one line a dataset."""
    lines = []
    for prefix, manifest in summary["datasets"].items():
        counts = manifest["lines"]
        lines.append(
            f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens "
            f"({manifest['dtype']}); left out: {counts['dropped']:,} bad lines, "
            f"{counts['duplicates']:,} duplicates"
        )
    if summary.get("already_done"):
        lines.append("already complete; nothing to do (remove the .json files to make it again)")
    else:
        first = next(iter(summary["datasets"].values()))
        rate = first["lines"]["text_bytes"] / summary["seconds"] / 1e6
        reused = f"; {summary['parts_reused']} parts of an earlier run" if summary["parts_reused"] else ""
        lines.append(f"{summary['seconds']:.1f} s, {rate:.1f} MB/s{reused}")
    return "\n".join(lines)

"""A whole preprocessing run: plan, parts, dataset; resumable at every moment."""

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.data.files import sha256_file
from megatron_ext.data.indexed import optimal_dtype
from megatron_ext.data.manifest import read_manifest
from megatron_ext.data.preprocess import assemble, encoding
from megatron_ext.data.preprocess.options import Options, PreprocessError, chunk_size, plan_id
from megatron_ext.data.preprocess.pool import Failure, run_chunks
from megatron_ext.data.preprocess.progress import Progress
from megatron_ext.data.preprocess.sources import Chunk, Source, chunks, find_sources, units
from megatron_ext.data.preprocess.worker import Part, Recipe, read_part
from megatron_ext.data.writer import publish
from megatron_ext.tokenizer.build import Tokenizer


def preprocess(options: Options, quiet: bool = False) -> dict:
    """Write ``PREFIX_KEY_document.bin/.idx/.json`` for each key; the summary of the run.

    Killed at any moment, the same call goes on where it was and gives the same bytes. Memory is
    about 100 MB a worker, 16 times the longest line, one chunk of a compressed input a worker, and
    28 bytes a document (76 with dedup).

    Raises:
        PreprocessError: the input cannot be used; nothing is left behind.
        OSError: a file cannot be read or written.
        ValueError: the tokenizer cannot be built, an input is not there.
    """
    sources = find_sources(options.inputs)
    tokenizer, _ = encoding.load(options.tokenizer)
    plan = plan_id(options, sources, tokenizer.sha256)
    finished = _finished(options, sources, plan)
    if finished is not None:
        return finished | {"already_done": True}
    known = all(source.bytes is not None for source in sources) and options.shard is None
    progress = Progress(
        sum(source.bytes for source in sources) if known else None, options.log_interval, quiet
    )
    try:
        with _work_folder(options, plan, progress) as lock:
            return _Run(options, sources, tokenizer, plan, progress, lock).run()
    finally:
        progress.close()


def _finished(options: Options, sources: list[Source], plan: str) -> dict | None:
    """The summary of an earlier run that did the very same, if its files are all there."""
    if any(source.bytes is None for source in sources):
        return None
    summary = {"datasets": {}}
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


@contextmanager
def _work_folder(options: Options, plan: str, progress: Progress) -> Iterator[int]:
    """The folder of finished parts, for this process alone; parts of another plan are removed.

    Removed at the end, and after an error of the input; kept when the run is killed.
    """
    folder = options.work_folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder}: another run is writing this output; wait for it, or stop it") from None
        _adopt(folder, plan, progress)
        try:
            yield lock
        except PreprocessError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _adopt(folder: Path, plan: str, progress: Progress) -> None:
    """Keep the parts of the same plan, remove others."""
    marker = folder / "plan"
    if marker.exists() and marker.read_text() == plan:
        progress.say(f"going on with what an earlier run left in {folder}")
        return
    stale = [entry for entry in folder.iterdir() if entry.name != "lock"]
    if stale:
        progress.say(f"{folder}: left by a run with other input or options; starting over")
    for entry in stale:
        entry.unlink()
    aside = folder / "plan.aside"
    aside.write_text(plan)
    os.replace(aside, marker)


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
        self.positions = [0] * len(sources)
        self.hashes = _InputHashes(sources)
        self.piped = {i: hashlib.sha256() for i, source in enumerate(sources) if source.bytes is None}

    def run(self) -> dict:
        failure = run_chunks(
            self._chunks_to_do(),
            self.options.workers,
            Recipe(
                self.folder,
                tuple(self.options.json_keys),
                self.tokenizer.eod if self.options.append_eod else None,
                self.options.on_bad_line,
                self.options.dedup,
            ),
            self.options.tokenizer,
            self._done,
            self.lock,
        )
        if failure is not None:
            raise self._stopped(failure)
        parts = [self.parts[number] for number in sorted(self.parts)]
        empty = self._check_documents(parts)
        return self._assemble(parts, empty)

    def _chunks_to_do(self) -> Iterator[Chunk]:
        """The chunks, without those that an earlier run finished."""
        self.hashes.start()  # not before: processes are forked from one thread
        size = chunk_size(self.options, self.sources)
        for chunk in chunks(self.sources, size, self.options.shard):
            if chunk.source in self.piped:
                self.piped[chunk.source].update(chunk.text)
            part = read_part(self.folder, chunk.number)
            if part is not None and (part.source, part.fingerprint) == (chunk.source, chunk.fingerprint()):
                self.reused += 1
                self._done(chunk, part, reused=True)
            else:
                yield chunk

    def _done(self, chunk: Chunk, part: Part, reused: bool = False) -> None:
        self.parts[part.number] = part
        begin = chunk.begin if self.sources[chunk.source].kind == "plain" else self.positions[chunk.source]
        self.positions[chunk.source] = max(self.positions[chunk.source], chunk.position)
        self.progress.add(
            max(0, chunk.position - begin), part.bytes, part.documents, sum(part.tokens.values()), reused
        )

    def _stopped(self, failure: Failure) -> PreprocessError:
        chunk = failure.chunk
        line = self._lines_before(chunk.number, chunk.source) + failure.line
        return PreprocessError(
            f"{chunk.path}: line {line}: {failure.reason}. Nothing was written; mend the line, or leave such "
            "lines out with --on-bad-line skip or quarantine"
        )

    def _lines_before(self, number: int, source: int) -> int:
        """Lines of the source before the chunk ``number``."""
        mine = [part for part in self.parts.values() if part.source == source and part.number < number]
        return self._lines_of_other_shards(source) + sum(part.lines for part in mine)

    def _lines_of_other_shards(self, source: int) -> int:
        if self.options.shard is None or self.sources[source].kind != "plain":
            return 0
        size = chunk_size(self.options, self.sources)
        mine = units(self.sources, size, self.options.shard)
        begin = next(begin for which, begin, _ in mine if which == source)
        return _count_lines(self.sources[source].path, begin)

    def _check_documents(self, parts: list[Part]) -> list[str]:
        """Names of the inputs without documents; an error where bad input is one."""
        found = dict.fromkeys(range(len(self.sources)), 0)
        for part in parts:
            found[part.source] += part.documents + part.bad_lines
        if self.options.shard is not None:
            return []
        empty = [self.sources[source].path for source, count in found.items() if count == 0]
        if empty and (self.options.on_bad_line == "stop" or len(empty) == len(found)):
            raise PreprocessError(f"{empty[0]}: holds no documents. Nothing was written")
        if not any(part.documents for part in parts):
            raise PreprocessError(f"{self.sources[0].path}: no line can be used. Nothing was written")
        return empty

    def _assemble(self, parts: list[Part], empty: list[str]) -> dict:
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
            "options": options.describe(),
            "inputs": self._inputs(),
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
        summary = {"datasets": {}, "seconds": round(self.progress.seconds(), 3), "parts_reused": self.reused}
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

    def _inputs(self) -> list[dict]:
        found = self.hashes.wait()
        return [
            {
                "name": source.path,
                "bytes": source.bytes,
                "sha256": self.piped[i].hexdigest() if i in self.piped else found[source.path],
            }
            for i, source in enumerate(self.sources)
        ]


class _InputHashes(threading.Thread):
    """sha256 of every input file, while the workers are busy with them."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__(daemon=True)
        self.paths = [source.path for source in sources if source.bytes is not None]
        self.found: dict[str, str] = {}
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            for path in self.paths:
                if path not in self.found:
                    self.found[path] = sha256_file(path)
        except OSError as error:
            self.error = error

    def wait(self) -> dict[str, str]:
        self.join()
        if self.error is not None:
            raise self.error
        return self.found


def _count_lines(path: str, end: int) -> int:
    """Lines that begin in the first ``end`` bytes of a file."""
    if end == 0:
        return 0
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(1 << 20, end))):
            count += block.count(b"\n")
            end, last = end - len(block), block[-1:]
    return count + (last != b"\n")


def describe(summary: dict) -> str:
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

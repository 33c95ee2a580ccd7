"""The files that the words of --input stand for, and of what kind each is."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.common.files import FileState
from megatron_ext.data.text import parquet
from megatron_ext.data.text.unpack import SourceError, kind_of

STDIN = "-"
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = ("", ".gz", ".zst", ".xz", ".bz2")
SUFFIXES = (*(json + packed for json in JSON_SUFFIXES for packed in COMPRESSED_SUFFIXES), parquet.SUFFIX)
#: What a folder of the Hugging Face hub says of its parquet files.
DESCRIPTIONS = ("dataset_infos.json",)
#: Names of what a preprocessing run keeps beside its output.
WORK_FOLDER, BAD_LINES = "_preprocess_work", "_bad_lines.jsonl"
#: What a file that this program wrote says in its first bytes: manifests, maps of ids and the like.
OURS = b'"format": "megatron_ext.'
START_BYTES = 512
#: How text begins that is UTF-16 or UTF-32: with a byte order mark, or with NUL beside its first bracket.
WIDE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff", b"{\x00", b"\x00{", b"\x00\x00\x00{")


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        kind: "plain", "pipe", "parquet" or a compression.
        state: None for pipes.
        row_groups: of parquet.
    """

    path: str
    kind: str
    state: FileState | None = None
    row_groups: Sequence[parquet.RowGroup] = field(default=(), repr=False)

    @property
    def bytes(self) -> int | None:
        return None if self.state is None else self.state.size

    @property
    def is_cut_in_ranges(self) -> bool:
        """Whether workers read parts of the file for themselves."""
        return self.kind in ("plain", "parquet")


def find_sources(
    inputs: Sequence[str], produced: Iterable[str | Path] = (), keys: Sequence[str] = ()
) -> list[Source]:
    """The input files in the order of ``inputs``; globs and folders in the order of their names.

    Globs and folders leave out what this program wrote there: manifests, lists of bad lines, work
    folders, and everything that ``produced`` names or that lies below. They also leave out names that
    begin with a dot. Parquet files must have the columns ``keys``.

    Raises:
        SourceError: nothing there, not readable, named twice, UTF-16, damaged or other parquet, or what this
            Python cannot read for want of a package.
    """
    ours = {os.path.realpath(path) for path in produced}
    sources: list[Source] = []
    named_by: dict[str, int] = {}
    for number, word in enumerate(inputs):
        for source in _sources(word, ours, keys):
            before = named_by.setdefault(os.path.realpath(source.path), number)
            if before != number:
                raise SourceError(
                    f"--input {source.path}: is named twice, by {inputs[before]} and by {word}; its texts "
                    "would come twice"
                )
            sources.append(source)
    return sources


def refuse_pipes(sources: Iterable[Source], why: str) -> None:
    """Raise SourceError if one of the sources can be read only once, or not in part."""
    for source in sources:
        if source.kind == "pipe":
            raise SourceError(f"--input {source.path}: {why}, which a pipe does not allow; give a file")


def _sources(word: str, ours: set[str], keys: Sequence[str]) -> list[Source]:
    if word == STDIN:
        return [Source(STDIN, "pipe")]
    if os.path.isdir(word):
        names = sorted(_text_files(word))
        what = "the folder holds no .jsonl, .json (also .gz, .zst, .xz) or .parquet files"
    elif os.path.exists(word):
        return [_source(word, _start(word), keys)]
    else:
        names = sorted(name for name in glob.glob(word, recursive=True) if os.path.isfile(name))
        what = "no file matches" if glob.has_magic(word) else "there is no such file"
    found = []
    for name in names:
        real = Path(os.path.realpath(name))
        if ours.isdisjoint(map(str, (real, *real.parents))) and not _is_in_work_folder(name):
            start = _start(name)
            if not _is_ours(name, start):
                found.append(_source(name, start, keys))
    if not found:
        raise SourceError(f"--input {word}: {what}")
    return found


def _text_files(folder: str) -> Iterable[str]:
    """The files below a folder with the names of JSON lines and parquet; an unreadable folder is an error."""

    def refuse(error: OSError) -> None:
        raise SourceError(f"--input {folder}: {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.endswith(WORK_FOLDER) and name[0] != "."]
        names = (name for name in files if name.endswith(SUFFIXES) and name[0] != ".")
        yield from (os.path.join(parent, name) for name in names if name not in DESCRIPTIONS)


def _is_in_work_folder(name: str) -> bool:
    return any(part.endswith(WORK_FOLDER) for part in Path(name).parts[:-1])


def _is_ours(name: str, start: bytes) -> bool:
    return OURS in start or (name.endswith(BAD_LINES) and start.startswith(b'{"file": "'))


def _start(path: str) -> bytes:
    """The first bytes of a file; none of a pipe, which could not give them again."""
    try:
        if not os.path.isfile(path):
            return b""
        with open(path, "rb") as file:
            return file.read(START_BYTES)
    except OSError as error:
        raise SourceError(f"--input {path}: {error.strerror}") from error


def _source(path: str, start: bytes, keys: Sequence[str]) -> Source:
    try:
        if not os.path.isfile(path):
            return Source(path, "pipe")
        state = FileState.of(path)
    except OSError as error:
        raise SourceError(f"--input {path}: {error.strerror}") from error
    if path.endswith(parquet.SUFFIX) or start.startswith(parquet.MAGICS):
        return Source(path, "parquet", state, parquet.row_groups(path, keys))
    source = Source(path, kind_of(start), state)
    if source.kind == "zstd":
        require_zstandard(path)
    refuse_other_text(path, start)
    return source


def require_zstandard(path: str) -> None:
    """Raise SourceError where the package that reads zstd is not installed."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise SourceError(
            f"--input {path}: zstd files need: pip install zstandard (or: zstdcat FILE | ... --input -)"
        ) from None


def refuse_other_text(path: str, start: bytes) -> None:
    """Raise SourceError if a text that begins with ``start`` is UTF-16, UTF-32 or no text but parquet."""
    if start.startswith(WIDE):
        raise SourceError(
            f"--input {path}: is UTF-16 or UTF-32 text, where UTF-8 is read; convert it first, such as "
            "with: iconv -f UTF-16 -t UTF-8"
        )
    if start.startswith(parquet.MAGICS):
        raise SourceError(
            f"--input {path}: is parquet in an archive or a pipe, and parquet is read from files; unpack it"
        )

"""Parquet files: what their footers say, and the wanted columns of their rows.

A row group may be as large as the file: rows are read in batches, and a large row group is divided between
two batches.
"""

import faulthandler
import functools
import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ext.common.files import FileState
from megatron_ext.data.text.unpack import BUFFER, SourceError

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
#: How files begin; the second ones have an encrypted footer.
MAGICS = (b"PAR1", b"PARE")
#: A batch is about this much text, and at most so many rows: a footer may count a repeated text once.
BATCH_BYTES, BATCH_ROWS = 1 << 18, 1 << 13
#: A row group is divided where it is larger than so many chunks, into parts of this size: who reads a part
#: unpacks what lies before it too.
PART_CHUNKS = 4
#: The column that says where a document is from, as the key of this name does in JSON lines.
SOURCE_COLUMN = "source"


class RowGroup(NamedTuple):
    """Rows of a row group, and bytes of its wanted columns before compression, at least 1."""

    rows: int
    bytes: int

    @property
    def batch_rows(self) -> int:
        """Rows that are read at once."""
        return max(1, min(BATCH_ROWS, BATCH_BYTES * self.rows // self.bytes))


class RowRange(NamedTuple):
    """Rows [begin, end) of a row group; both counted from 0, as pyarrow counts them."""

    group: int
    begin: int
    end: int


class Damaged(ValueError):
    """The rows from here to the end of the row group cannot be read; the message is the reason."""


class Row(NamedTuple):
    """The values of the keys, None for null, and of the column "source"; bytes that may not be UTF-8."""

    values: list[bytes | None]
    source: bytes | None


def row_groups(path: str, keys: Sequence[str]) -> list[RowGroup]:
    """What the footer says of a file of which the columns ``keys`` are wanted.

    Raises:
        SourceError: pyarrow is not installed, the file is damaged, a column is not there or holds no texts.
    """
    _require_survived(path, tuple(keys))
    return _Reader(path, tuple(keys)).groups


def _require_survived(path: str, keys: tuple[str, ...]) -> None:
    """Read the footer in a forked process first: over some damage pyarrow aborts, which nothing catches.

    Such as a histogram of other levels than the column has: ``RowGroupMetaData.column`` throws in C++.
    """
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _Reader(path, keys)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise SourceError(
            f"--input {path}: is damaged: reading its footer ends the process "
            f"({signal.Signals(os.WTERMSIG(status)).name})"
        )


def cut(groups: Sequence[RowGroup], chunk_bytes: int) -> list[tuple[RowRange, ...]]:
    """The rows of a file in chunks: small row groups together up to ``chunk_bytes``, large ones in parts."""
    chunks: list[tuple[RowRange, ...]] = []
    ranges: list[RowRange] = []
    size = 0
    for number, group in enumerate(groups):
        batches = PART_CHUNKS * chunk_bytes * group.rows // (group.bytes * group.batch_rows)
        step = max(1, batches) * group.batch_rows
        for begin in range(0, group.rows, step):
            end = min(begin + step, group.rows)
            ranges.append(RowRange(number, begin, end))
            size += (end - begin) * group.bytes // group.rows
            if size >= chunk_bytes:
                chunks.append(tuple(ranges))
                ranges, size = [], 0
    if ranges or not chunks:
        chunks.append(tuple(ranges))
    return chunks


def read_rows(path: str, state: FileState | None, keys: Sequence[str], rows: RowRange) -> Iterator[Row]:
    """The rows of a range; the next range of the same row group is read on from there.

    Raises:
        Damaged: the rest of the row group cannot be read.
        SourceError: what :func:`row_groups` raises.
    """
    return _reader((os.getpid(), threading.get_ident()), path, state, tuple(keys)).rows(rows)


@functools.lru_cache(maxsize=1)
def _reader(whose: tuple[int, int], path: str, state: FileState | None, keys: tuple[str, ...]) -> "_Reader":
    """The file that a thread of a process read last, to be read on: no row group is entered in its middle."""
    return _Reader(path, keys)


class _Reader:
    """A file, and the place in one of its row groups up to which it was read."""

    def __init__(self, path: str, keys: tuple[str, ...]) -> None:
        try:
            self.file, self.keys = _opened(path), keys
            self.columns = _wanted_columns(path, self.file, keys)
            self.groups = _row_groups(path, self.file, self.columns)
        except Exception as error:
            if isinstance(error, SourceError) or not _is_damage(error):
                raise
            reason = f"is damaged, cut off or of an unknown kind of parquet: {_in_one_line(error)}"
            raise SourceError(f"--input {path}: {reason}") from None
        self.group, self.position = -1, 0
        self.batches: Iterator[RecordBatch] = iter(())

    def rows(self, wanted: RowRange) -> Iterator[Row]:
        """The rows of a range, in order."""
        if wanted.group != self.group or wanted.begin < self.position:
            self.group, self.position = wanted.group, 0
            self.batches = self.file.iter_batches(
                self.groups[wanted.group].batch_rows, [wanted.group], self.columns, use_threads=False
            )
        while self.position < wanted.end:
            yield from self._next(wanted.begin - self.position, wanted.end - self.position)

    def _next(self, begin: int, end: int) -> list[Row]:
        """Read a batch; its rows [begin, end), of which there may be none."""
        try:
            batch = next(self.batches)
            self.position += batch.num_rows
            begin = min(max(0, begin), batch.num_rows)
            return self._rows_of(batch.slice(begin, max(0, end - begin)))
        except StopIteration:
            reason = f"row group {self.group} ends behind {self.position} rows"
        except Exception as error:
            if not _is_damage(error):
                raise
            reason = _in_one_line(error)
        self.group = -1
        raise Damaged(f"the parquet data is damaged: {reason}")

    def _rows_of(self, batch: "RecordBatch") -> list[Row]:
        columns = [_as_bytes(batch.column(name)) for name in self.columns]
        values, sources = columns[: len(self.keys)], columns[len(self.keys) :] or [[None] * batch.num_rows]
        return [Row(row, source) for *row, source in zip(*values, *sources, strict=True)]


def _wanted_columns(path: str, file: "ParquetFile", keys: Sequence[str]) -> list[str]:
    """``keys``, and "source" where a file has it; raises SourceError where a key cannot be read."""
    schema = file.schema_arrow
    for key in keys:
        if key not in schema.names:
            there = ", ".join(map(repr, schema.names[:20])) or "none"
            raise SourceError(
                f"--input {path}: has no column {key!r} (columns: {there}); name the one that holds the text"
            )
        if schema.names.count(key) > 1:
            raise SourceError(f"--input {path}: has {schema.names.count(key)} columns {key!r}")
        kind = schema.field(key).type
        if not _is_text(kind):
            nested = "nested, " if kind.num_fields else ""
            raise SourceError(f"--input {path}: the column {key!r} is {nested}{kind}, not text")
    if SOURCE_COLUMN in keys or schema.names.count(SOURCE_COLUMN) != 1:
        return [*keys]
    kind = schema.field(SOURCE_COLUMN).type
    return [*keys, SOURCE_COLUMN] if _is_text(kind) or _is_integer(kind) else [*keys]


def _row_groups(path: str, file: "ParquetFile", wanted: Sequence[str]) -> list[RowGroup]:
    """Rows and sizes of the row groups; raises SourceError where the footer contradicts itself."""
    metadata, found = file.metadata, []
    leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in wanted]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(leaf) for leaf in leaves]
        for column in columns:
            if column.file_path:
                raise SourceError(f"--input {path}: its rows lie in other files, such as {column.file_path}")
            if column.num_values != group.num_rows or group.num_rows < 0:
                raise SourceError(
                    f"--input {path}: is damaged: row group {number} says {group.num_rows} rows, and "
                    f"{column.num_values} in its column {column.path_in_schema!r}"
                )
        size = sum(column.total_uncompressed_size for column in columns)
        found.append(RowGroup(group.num_rows, max(1, size)))
    if sum(group.rows for group in found) != metadata.num_rows:
        raise SourceError(
            f"--input {path}: is damaged: {metadata.num_rows} rows are not those of its row groups"
        )
    return found


def _opened(path: str) -> "ParquetFile":
    """The file with its footer read; nothing in it is unpickled or run."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SourceError(
            f"--input {path}: parquet files need pyarrow, of the extra [data]: pip install pyarrow"
        ) from None
    return pyarrow.parquet.ParquetFile(
        pyarrow.OSFile(os.fsencode(path)),
        buffer_size=BUFFER,
        pre_buffer=False,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )


def _is_damage(error: Exception) -> bool:
    from pyarrow import ArrowException

    known = ArrowException | OSError | UnicodeDecodeError
    return isinstance(error, known) and not isinstance(error, MemoryError)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = _stored(kind)
    tests = (
        types.is_string, types.is_large_string, types.is_string_view,
        types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _stored(kind: Any) -> Any:
    """The type of the values of a dictionary, and what an extension type such as JSON is stored as."""
    from pyarrow import BaseExtensionType, DictionaryType

    kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind
    return kind.value_type if isinstance(kind, DictionaryType) else kind


def _is_integer(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(_stored(kind))


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if isinstance(column, pyarrow.DictionaryArray):
        column = column.dictionary_decode()
    if _is_integer(column.type):
        column = column.cast(pyarrow.string())
    return column.cast(pyarrow.large_binary()).to_pylist()

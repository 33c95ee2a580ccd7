"""That the parts were made of what the manifest says, whatever happened to the inputs meanwhile."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from megatron_ext.common.files import FileState, input_changed, sha256_file
from megatron_ext.data.text.chunks import Chunk, Unit, range_of
from megatron_ext.data.text.documents import Documents, new_digest
from megatron_ext.data.text.sources import Source
from megatron_ext.data.text.unpack import BUFFER


class InputCheck(threading.Thread):
    """Reads every file once more while the workers are busy with it, and compares at the end.

    A worker's part carries the digest of the lines or rows that it read. If those of all parts are equal to
    those of one reading of the whole file, its sha256 is that of the text that was encoded. Streams
    are read by one process only, which takes their sha256 on the way.

    Args:
        sources: of the run.
        units: those that this run reads: another shard may have the others.
        chunk_bytes: of the chunks.
        keys: of the texts.
    """

    def __init__(
        self, sources: list[Source], units: Sequence[Unit], chunk_bytes: int, keys: Sequence[str]
    ) -> None:
        super().__init__(daemon=True)
        self.sources, self.units, self.chunk_bytes, self.keys = sources, units, chunk_bytes, keys
        self.used = sorted({unit.source for unit in units})
        self.sha256: dict[int, str] = {}
        self.expected: dict[tuple[int, int], str] = {}
        self.read: list[tuple[int, int, str]] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for number in self.used:
                source = self.sources[number]
                if source.kind == "plain":
                    self.sha256[number], pieces = digests(source.path, self.chunk_bytes)
                    self.expected |= {(number, begin): piece for begin, piece in pieces.items()}
                elif source.kind == "parquet":
                    self.sha256[number] = sha256_file(source.path)
                    units = (unit for unit in self.units if unit.source == number)
                    self.expected |= {
                        (number, unit.begin): rows_digest(range_of(unit, source), self.keys) for unit in units
                    }
        except Exception as error:  # whatever it is, the run must not end well
            self.error = error

    def add(self, chunk: Chunk, digest: str) -> None:
        """A part of this chunk was made, of lines with this digest."""
        if self.sources[chunk.source].is_cut_in_ranges:
            self.read.append((chunk.source, chunk.begin, digest))
        elif chunk.sha256 is not None:
            self.sha256[chunk.source] = chunk.sha256

    def finish(self) -> list[dict[str, Any]]:
        """Name, size and sha256 of every input that was read.

        Raises:
            InputChanged: an input is not what it was when the run began.
        """
        self.join()
        if isinstance(self.error, FileNotFoundError):
            raise input_changed(self.error.filename)
        if self.error is not None:
            raise self.error
        for number, begin, digest in self.read:
            if self.expected.get((number, begin)) != digest:
                raise input_changed(self.sources[number].path)
        for number in self.used:
            self.require_unchanged(number)
        return [
            {"name": source.path, "bytes": source.bytes, "sha256": self.sha256[number]}
            for number, source in enumerate(self.sources)
            if number in self.sha256
        ]

    def require_unchanged(self, number: int) -> None:
        """Raise InputChanged if the file is not what it was; links and permissions may change."""
        source = self.sources[number]
        if source.state is None:
            return
        try:
            now = FileState.of(source.path)
        except OSError:
            raise input_changed(source.path) from None
        if now == source.state:
            return
        # The time of change can be set back, that of the status cannot: the content decides.
        if not now.is_as(source.state) or sha256_file(source.path) != self.sha256.get(number):
            raise input_changed(source.path)


def rows_digest(chunk: Chunk, keys: Sequence[str]) -> str:
    """The digest of the rows of a parquet file's chunk."""
    documents = Documents(chunk, keys)
    for _ in documents:
        pass
    return documents.digest.hexdigest()


def digests(path: str, chunk_bytes: int) -> tuple[str, dict[int, str]]:
    """sha256 of a file, and the digest of the lines that each range of ``chunk_bytes`` owns, by its begin."""
    whole, piece, pieces = hashlib.sha256(), new_digest(), {}
    begin, position = 0, 0  # of the range; of the block
    with open(path, "rb") as file:
        while block := file.read(BUFFER):
            whole.update(block)
            view, start = memoryview(block), 0
            # The next range begins behind the first line end from its last byte but one on.
            while (end := block.find(b"\n", max(begin + chunk_bytes - 1 - position, 0))) >= 0:
                piece.update(view[start : max(start, end + 1)])
                start, pieces[begin], piece = max(start, end + 1), piece.hexdigest(), new_digest()
                begin += chunk_bytes
            piece.update(view[start:])
            position += len(block)
    while begin < max(position, 1):
        pieces[begin], piece = piece.hexdigest(), new_digest()
        begin += chunk_bytes
    return whole.hexdigest(), pieces

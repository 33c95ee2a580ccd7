"""The text of compressed files and pipes, and the sha256 of what was read of them."""

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from typing import Any

PACKED_BLOCK = 1 << 12  # small: a few packed bytes may be much text
BUFFER = 1 << 20
MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a frame to be skipped comes first, as pzstd writes it
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
MAGIC_BYTES = max(map(len, MAGICS))


class SourceError(ValueError):
    """An input that is not there or cannot be opened."""


def kind_of(start: bytes) -> str:
    """The compression of a file that begins like this, or "plain"."""
    return next((name for magic, name in MAGICS.items() if start.startswith(magic)), "plain")


def is_damage(error: Exception) -> bool:
    """Whether this is what reading a damaged or cut off archive raises."""
    known = OSError | EOFError | zlib.error | lzma.LZMAError
    return isinstance(error, known) or type(error).__name__ == "ZstdError"


class HashingReader(io.RawIOBase):
    """A file or pipe that knows the sha256 of all that was read of it."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self.raw, self.digest = raw, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # read1 waits for no more than there is: a pipe may be slow.
        data = self.raw.read1(len(buffer))
        self.digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def finish(self) -> str:
        """Read the rest, such as what follows an archive's end; the sha256 of everything."""
        while data := self.raw.read(BUFFER):
            self.digest.update(data)
        return self.digest.hexdigest()


def unpacked(raw: io.BufferedIOBase, kind: str) -> io.BufferedIOBase:
    """The text of ``raw``; reading it raises what :func:`is_damage` knows.

    Its ``read1`` hands over what there is: of an archive that is cut off, all that can be read.
    """
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind in ("xz", "bzip2", "zstd"):
        return io.BufferedReader(_Streams(raw, kind), BUFFER)
    return raw


class _Streams(io.RawIOBase):
    """The text of the compressed streams of a file, one after another, as pbzip2, pxz and pzstd write them.

    Python's readers of xz and bzip2 take a damaged stream behind the first for the end of the file, and
    zstandard's takes one that is cut off for one that ended.
    """

    def __init__(self, raw: io.BufferedIOBase, kind: str) -> None:
        self.raw, self.kind = raw, kind
        self.stream: Any = None  # of the three libraries
        self.packed, self.text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.text:
            if self.stream is None and self.kind == "xz":
                self.packed = self.packed.lstrip(b"\0")  # streams are padded to whole words
            if not self.packed and getattr(self.stream, "needs_input", True):
                self.packed = self.raw.read(PACKED_BLOCK)
                if not self.packed:
                    if self.stream is not None:
                        raise EOFError(f"the file ends within a {self.kind} stream")
                    return 0
                continue
            self._decompress()
        size = min(len(buffer), len(self.text))
        buffer[:size] = self.text[:size]
        self.text = self.text[size:]
        return size

    def _decompress(self) -> None:
        self.stream = self.stream or _decompressor(self.kind)
        # zstandard's takes no limit.
        limit = () if self.kind == "zstd" else (BUFFER,)
        self.text = memoryview(self.stream.decompress(self.packed, *limit))
        self.packed = b""
        if self.stream.eof:
            self.packed, self.stream = self.stream.unused_data, None


def _decompressor(kind: str) -> Any:
    """What unpacks one stream."""
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()

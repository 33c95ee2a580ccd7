"""The text of compressed files and pipes, and the sha256 of what was read of them."""

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from typing import BinaryIO

ZSTD_BLOCK = 1 << 12  # small: a few packed bytes may be much text
BUFFER = 1 << 20
MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a frame to be skipped comes first, as pzstd writes it
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
MAGIC_BYTES = max(map(len, MAGICS))


def kind_of(start: bytes) -> str:
    """The compression of a file that begins like this, or "plain"."""
    return next((name for magic, name in MAGICS.items() if start.startswith(magic)), "plain")


def is_damage(error: Exception) -> bool:
    """Whether this is what reading a damaged or cut off archive raises."""
    known = OSError | EOFError | zlib.error | lzma.LZMAError
    return isinstance(error, known) or type(error).__name__ == "ZstdError"


class HashingReader(io.RawIOBase):
    """A file or pipe that knows the sha256 of all that was read of it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.digest = raw, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
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


def unpacked(raw: BinaryIO, kind: str) -> BinaryIO:
    """The text of ``raw``; reading it raises what :func:`is_damage` knows.

    Its ``read1`` hands over what there is: of an archive that is cut off, all that can be read.
    """
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    if kind == "zstd":
        return io.BufferedReader(_ZstdFrames(raw), BUFFER)
    return raw


class _ZstdFrames(io.RawIOBase):
    """The text of zstd frames; zstandard's own reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw, self.decompressor = raw, zstandard.ZstdDecompressor()
        self.frame = None
        self.packed, self.text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.text:
            self.packed = self.packed or self.raw.read(ZSTD_BLOCK)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._decompress()
        size = min(len(buffer), len(self.text))
        buffer[:size] = self.text[:size]
        self.text = self.text[size:]
        return size

    def _decompress(self) -> None:
        self.frame = self.frame or self.decompressor.decompressobj()
        self.text = memoryview(self.frame.decompress(self.packed))
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None

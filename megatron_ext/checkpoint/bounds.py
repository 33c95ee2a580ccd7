"""Limits on the expansion of a checkpoint's bytes, checked before any object is built from them.

A pickle of a few hundred bytes can describe tuples that share their halves in 60 levels: it needs little
memory, but its hash, its text or a comparison takes 2^60 steps. A zip of a few megabytes can unpack to any
number of gigabytes. Both are checked here without building the objects.
"""

import io
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

#: Nesting depth. Checkpoints have about ten levels; hashing a very deep tuple crashes the process.
MAX_DEPTH = 100
#: Parts per byte of a pickle, each counted as often as it is reached. Checkpoints have less than one; the
#: most expensive legitimate byte is a reference to an earlier short tuple.
PARTS_PER_BYTE, MIN_PARTS = 20, 10_000
_STORE, _FETCH = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_CHANGE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_MARK, _PLAIN = -1, 0


def _effect(opcode: Any) -> tuple[int, bool, int]:
    """How many objects an opcode pops (below the mark, if it pops to one), and how many it pushes."""
    before, to_mark = opcode.stack_before, pickletools.markobject in opcode.stack_before
    return before.index(pickletools.markobject) if to_mark else len(before), to_mark, len(opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}
_PLAIN_VALUES = {
    name
    for name, effect in _EFFECTS.items()
    if effect == (0, False, 1) and name not in _FETCH and not name.startswith("EMPTY_") and name != "MARK"
} | {"EMPTY_TUPLE"}


class Unbounded(ValueError):
    """Content that would expand beyond the limits; the message says what."""


def require_bounded(pickled: bytes | IO[bytes], size: int | None = None) -> None:
    """Raise Unbounded if the objects of a pickle are too deep, or too large for its ``size`` bytes.

    A file is read from its position to the end of the pickle. Raises another ValueError, or LookupError,
    for an incomplete or invalid pickle.
    """
    objects = _Objects(len(pickled) if isinstance(pickled, bytes) else size or 0)
    for opcode, argument, _ in pickletools.genops(pickled):
        objects.interpret(opcode.name, argument)
    objects.require_bounded()


class _Objects:
    """The objects of a pickle, as numbers, each with the objects that it contains; none is built."""

    def __init__(self, size: int):
        self.size = size
        self.held: list[list[int]] = [[]]
        #: The number of plain values in each; object 0 represents any plain value.
        self.plain = [0]
        self.stack: list[int] = []
        self.memo: dict[int, int] = {}

    def interpret(self, name: str, argument: Any) -> None:
        """Interpret one opcode; most push a plain value or an earlier object."""
        if name in _PLAIN_VALUES:
            self.stack.append(_PLAIN)
        elif name in _FETCH:
            self.stack.append(self.memo[argument])
        elif name in _STORE:
            number = len(self.memo) if name == "MEMOIZE" else argument
            if number > self.size:
                # The unpickler allocates a table up to the largest number: five bytes can allocate gigabytes.
                raise Unbounded(f"it numbers an object {number}, though it has {self.size} bytes")
            self.memo[number] = self.stack[-1]
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name in _CHANGE:
            changed, *added = self._consumed(name)
            if changed == _PLAIN:
                raise Unbounded("it changes an object that cannot change")
            self._hold(changed, added)
            self.stack.append(changed)
        else:
            consumed = self._consumed(name)
            for _ in range(_EFFECTS[name][2]):
                self.stack.append(self._made(consumed, name.startswith("EMPTY_")))

    def _consumed(self, name: str) -> list[int]:
        """The objects that an opcode pops, in order."""
        count, to_mark, _ = _EFFECTS[name]
        above: list[int] = []
        if to_mark:
            while self.stack[-1] != _MARK:
                above.append(self.stack.pop())
            self.stack.pop()
            above.reverse()
        if count > len(self.stack):
            raise Unbounded("it takes more than there is")
        below = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        if _MARK in below:
            raise Unbounded("it takes a mark for an object")
        return below + above

    def _made(self, of: list[int], can_change: bool) -> int:
        if not of and not can_change:
            return _PLAIN
        self.held.append([])
        self.plain.append(0)
        self._hold(len(self.held) - 1, of)
        return len(self.held) - 1

    def _hold(self, number: int, added: list[int]) -> None:
        objects = [each for each in added if each]
        self.held[number] += objects
        self.plain[number] += len(added) - len(objects)

    def require_bounded(self) -> None:
        """Count the parts of every object recursively, each as often as it is reached."""
        limit = max(MIN_PARTS, PARTS_PER_BYTE * self.size)
        sizes, depths = [0] * len(self.held), [0] * len(self.held)  # 0: not counted yet
        for first in range(len(self.held)):
            path = [] if sizes[first] else [(first, iter(self.held[first]))]
            while path:
                number, ahead = path[-1]
                part = next((part for part in ahead if not sizes[part]), None)
                if part is not None:
                    path.append((part, iter(self.held[part])))
                else:
                    path.pop()
                    sizes[number] = 1 + self.plain[number] + sum(sizes[part] for part in self.held[number])
                    depths[number] = 1 + max((depths[part] for part in self.held[number]), default=0)
                # An object that contains itself also makes the path too long.
                if len(path) > MAX_DEPTH or depths[number] > MAX_DEPTH:
                    raise Unbounded(f"it would make an object of parts within parts, over {MAX_DEPTH} deep")
                if sizes[number] > limit:
                    raise Unbounded(
                        f"it has {self.size} bytes, and would make an object of over {limit} parts"
                    )


class Window(io.RawIOBase):
    """``length`` bytes of a file from ``begin`` on, as a file; torch's view mishandles SEEK_END."""

    def __init__(self, file: IO[bytes], begin: int, length: int):
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._begin + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def require_stored_archive(file: IO[bytes], size: int) -> bytes:
    """The pickle in an archive of torch.save; raises Unbounded for any other kind of archive.

    torch stores records uncompressed, one after the other, without a comment. No reader can then unpack
    more than ``size`` bytes, or find another directory than this one.
    """
    end = _end_of(file, size)
    if end is None:
        raise Unbounded("it is not an archive of torch.save")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
        if packed or sum(record.file_size for record in records) > size:
            raise Unbounded(f"it would unpack to more than its {size} bytes")
        if len(names) != len(records) or min((r.header_offset for r in records), default=1) != 0:
            raise Unbounded("its records are not those of torch.save")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Unbounded("it holds no pickle, or several")
        return archive.read(pickles[0])


def _end_of(file: IO[bytes], size: int) -> int | None:
    """Where an archive's directory ends; None if the end of the file is not as torch writes it."""
    file.seek(max(0, size - 98))
    tail = file.read(98).rjust(98, b"\0")
    locator, end = tail[56:76], tail[76:]
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        return None
    if locator[:4] == b"PK\6\7":
        wide = struct.unpack("<Q", locator[8:16])[0]
        return wide if wide == size - 98 and tail[:4] == b"PK\6\6" else None
    return size - 22


def bytes_in(folder: Path) -> int:
    """The size of all files of a checkpoint: an upper limit of the tensors in it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())

"""One line of JSON, or value of a column -> the texts to encode, or the reason why it cannot be used."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

try:
    import orjson
except ImportError:  # optional: parses several times faster
    orjson = None  # type: ignore[assignment]

#: The texts of one key: upstream takes a string, or a list of strings as the sentences of a document.
Texts = list[bytes]


class BadLine(ValueError):
    """A line that cannot be used; the message is the reason."""


def load_record(line: bytes, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object of a line, which has each of ``keys`` once at most.

    Raises:
        BadLine: not UTF-8, not JSON, no object, or one of ``keys`` stands in it twice.
    """
    record = _load(line)
    if not isinstance(record, dict):
        raise BadLine(f"the line is {json_kind(record)}, not a JSON object")
    for key in keys:
        if line.count(f'"{key}"'.encode()) > 1 and _keys(line).count(key) > 1:
            raise BadLine(f"the key {key!r} stands in it twice, so one of its values would be lost")
    return record


def _keys(line: bytes) -> list[str]:
    """The keys of the JSON object of a line, with repetitions."""
    keys: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]

    try:
        json.loads(line, object_pairs_hook=note, parse_int=str)  # called for the outermost object last
    except RecursionError as error:
        raise BadLine(f"not usable JSON: {error}") from None
    return keys


def without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object, for ``object_pairs_hook``; raises ValueError where a key stands twice."""
    if (twice := repeated(pairs)) is not None:
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return dict(pairs)


def repeated(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that stands twice among the pairs of a JSON object."""
    keys = [key for key, _ in pairs]
    return None if len(set(keys)) == len(keys) else next(key for key in keys if keys.count(key) > 1)


def _load(line: bytes) -> object:
    if orjson is not None:
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass  # stricter than json in places: let json decide, so that both give the same
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(_not_utf_8(error)) from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError) as error:
        raise BadLine(f"not usable JSON: {error}") from None


def texts_of(record: dict[str, Any], key: str) -> Texts:
    """What a record holds at ``key``: one text, or those of a list.

    Raises:
        BadLine: it holds nothing there, or no text.
    """
    if key not in record:
        there = ", ".join(map(repr, list(record)[:8])) or "none"
        raise BadLine(f"no key {key!r} (keys: {there}); name the one that holds the text")
    value = record[key]
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, str):
            where = "a list with " if isinstance(value, list) else ""
            raise BadLine(f"the value of {key!r} is {where}{json_kind(part)}, not text")
    try:
        return [part.encode("utf-8") for part in parts]
    except UnicodeEncodeError:
        raise BadLine(f"the value of {key!r} holds half of a surrogate pair, which is no character") from None


def text_of_value(value: bytes | None, key: str) -> Texts:
    """What a row holds in the column ``key``.

    Raises:
        BadLine: null, or not UTF-8.
    """
    if value is None:
        raise BadLine(f"the value of {key!r} is null, not text")
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"the value of {key!r} is {_not_utf_8(error)}") from None
    return [value]


def _not_utf_8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start} ({error.reason})"


def json_kind(value: object) -> str:
    """What JSON calls a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def content_hash(record: list[Texts]) -> bytes:
    """16 bytes that are equal only for equal texts; chance of any collision in 2**40 documents: 1e-15."""
    digest = hashlib.blake2b(digest_size=16)
    for texts in record:
        for text in texts:
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
        digest.update(b"\xff" * 8)
    return digest.digest()

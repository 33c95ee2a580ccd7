"""The fields of the records of benchmarks: each is what it must be, or the error names it."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from megatron_ext.data.text.records import json_kind, without_repeats

#: Of answers, in their order.
LETTERS = "ABCDEFGHIJ"
T = TypeVar("T")


def checked(records: Iterable[Any], make: Callable[[int, Any], T], what: str) -> Iterator[T]:
    """``make`` of each record; an error of a record says which it is."""
    for number, record in enumerate(records, 1):
        try:
            yield make(number, record)
        except ValueError as error:
            raise ValueError(f"{what} {number}: not a question of this benchmark ({error})") from None


def field(record: Any, name: str) -> Any:
    """What a record has there."""
    if not isinstance(record, dict):
        raise ValueError(f"{json_kind(record)}, not an object")
    if record.get(name) is None:
        raise ValueError(f"no {name!r}")
    return record[name]


def text_of(record: Any, name: str) -> str:
    """The text in a field."""
    return as_text(field(record, name), name)


def as_text(value: Any, name: str) -> str:
    """A text that says something; ``name`` is the field's."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: {json_kind(value)}, not a text")
    if not value.strip():
        raise ValueError(f"{name}: empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: holds half of a surrogate pair, which is no character") from None
    return value


def as_texts(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a list."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: {json_kind(value)}, not a list of texts")
    return tuple(as_text(one, f"{name} {number}") for number, one in enumerate(value, 1))


def as_choices(value: Any, name: str) -> tuple[str, ...]:
    """Answers to choose among: two at least, which are not all equal.

    Some may be: five of the published questions are so.
    """
    choices = as_texts(value, name)
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{name}: {len(choices)} answers, not 2 to {len(LETTERS)}")
    if len({choice.strip() for choice in choices}) == 1:
        raise ValueError(f"{name}: the answers are equal")
    return choices


def index_of(value: Any, known: Sequence[str], name: str) -> int:
    """Which of ``known`` a value is; ``name`` is the field's."""
    found = [place for place, one in enumerate(known) if one == value]
    if len(found) != 1:
        raise ValueError(f"{name}: {value!r} is {'several' if found else 'none'} of {', '.join(known)}")
    return found[0]


def texts_of_row(row: dict[str | None, Any], names: Sequence[str]) -> list[str]:
    """The texts of a row of CSV, in which a comma without quotes would have moved them."""
    if None in row:
        raise ValueError("more fields than the first line names; is a comma not in quotes?")
    return [text_of(row, name) for name in names]


def json_lines(content: str) -> Iterator[Any]:
    """The value of each line."""
    lines = content.removesuffix("\n").split("\n") if content else []  # a text may hold other line ends
    for number, line in enumerate(lines, 1):
        try:
            yield parsed(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def parsed(content: str) -> Any:
    """The value of JSON; raises ValueError also where an object has a key twice."""
    try:
        return json.loads(content, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None

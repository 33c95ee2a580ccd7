"""JSON files of other makers, which may be damaged or hostile: one reader, with limits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_ext.interchange.errors import InterchangeError

#: Twice the largest tokenizers and shard indices in use; parsed, such a file may take twenty times as much.
MOST_BYTES = 64 << 20


def read_object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; ``missing``, if given, where there is no such file.

    Raises:
        InterchangeError: no such file, or none that is JSON, an object, of modest size and depth, in which
            every name is said once; the message names it.
    """
    if missing is not None and not path.is_file():
        return missing
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except RecursionError:
        raise InterchangeError(f"{path} is nested too deeply to be read") from None
    except (OSError, ValueError) as error:
        raise InterchangeError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InterchangeError(f"{path} does not hold a JSON object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two equal names they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is said twice")
    return found

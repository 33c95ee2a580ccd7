"""What was scored before a kill: a file that lines are only appended to, and that is read tolerantly."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.common.lock import open_locked
from megatron_ext.evaluation.requests import Score


class ScoreFile:
    """The scores of passes by their keys (``evaluation.scoring.Memory``); and generated texts.

    One process writes it, and keeps others out. A line that a killed process left unfinished is cut off, one
    that is no record is passed over: what it said is scored again.

    Raises:
        BlockingIOError: another process writes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = open_locked(path)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another evaluation writes there", str(path.parent)) from error
        content = path.read_bytes()
        whole = content.rpartition(b"\n")[0]
        os.ftruncate(self._descriptor, len(whole) + bool(whole))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._known: dict[str, Any] = {}
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self._known[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def recall(self, keys: Sequence[str]) -> dict[str, list[Score]]:
        """The scores of those ``keys`` that are there."""
        return {key: [Score(*score) for score in self._known[key]] for key in keys if key in self._known}

    def keep(self, key: str, scores: Any) -> None:
        """Append a record; it survives the end of this process, not of the machine."""
        self._known[key] = scores
        line = memoryview(json.dumps({"key": key, "value": scores}).encode() + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]

    def text(self, key: str) -> str | None:
        """A text that was generated."""
        return self._known.get(key)

    def close(self) -> None:
        """Let others write it."""
        os.close(self._descriptor)

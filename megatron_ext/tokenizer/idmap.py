"""The map from the ids of a tokenizer to those of a compressed one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import load_arrays, write_aside

FORMAT = "megatron_ext.id_map/1"


@dataclass
class IdMap:
    """Old id -> new id.

    Attributes:
        new_id: int32 [old vocabulary]; -1 where the piece was dropped.
        new_size: pieces of the new tokenizer.
        old_sha256, new_sha256: of the two model files.
    """

    new_id: np.ndarray
    new_size: int
    old_sha256: str
    new_sha256: str

    @classmethod
    def of_kept(cls, kept: np.ndarray, old_size: int, old_sha256: str, new_sha256: str) -> IdMap:
        """The map that keeps the pieces ``kept`` (old ids, ascending) in their order."""
        new_id = np.full(old_size, -1, dtype=np.int32)
        new_id[kept] = np.arange(len(kept), dtype=np.int32)
        return cls(new_id, len(kept), old_sha256, new_sha256)

    @property
    def old_id(self) -> np.ndarray:
        """The old id of each new piece, int64 [new vocabulary]: the embedding rows to take over."""
        return np.flatnonzero(self.new_id >= 0)

    def save(self, path: str | Path) -> None:
        """Writes .npz, or JSON for any other name."""
        path = Path(path)
        facts: dict[str, Any] = {
            "format": FORMAT,
            "old_sha256": self.old_sha256,
            "new_sha256": self.new_sha256,
        }
        if path.suffix == ".npz":
            arrays = {name: np.array(value) for name, value in facts.items()}
            write_aside(path, lambda file: np.savez_compressed(file, new_id=self.new_id, **arrays))
            return
        facts |= {"old_size": len(self.new_id), "new_size": self.new_size, "new_id": self.new_id.tolist()}
        write_aside(path, json.dumps(facts).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> IdMap:
        """Reads what ``save`` wrote; nothing is unpickled.

        Raises:
            ValueError: the file is no id map, or its new ids are not 0, 1, ... in order.
        """
        path = Path(path)
        try:
            if path.suffix == ".npz":
                facts = load_arrays(path)
            else:
                facts = json.loads(path.read_text(encoding="utf-8"))
            if str(facts["format"]) != FORMAT:
                raise ValueError(f"its format is {facts['format']}")
            new_id = np.asarray(facts["new_id"], dtype=np.int32)
            kept = new_id[new_id >= 0]
            if new_id.ndim != 1 or not np.array_equal(kept, np.arange(len(kept))):
                raise ValueError("its new ids are not 0, 1, 2, ... in order")
            return cls(new_id, len(kept), str(facts["old_sha256"]), str(facts["new_sha256"]))
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path}: not a map of ids ({error}); write it with compress_tokenizer.py"
            ) from error

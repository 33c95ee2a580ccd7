"""What a teacher reads in place of the tokens of a student whose vocabulary is a part of its own.

Its own tokens of the student's text: the student's, with the dropped pieces joined again. A teacher that
reads a dropped piece in parts reads what it has never seen, and does not expect the second part after the
first. Where one of its own tokens ends, its prediction is a target for the student's next token
(:mod:`fold`); within one of its tokens there is none, and the text itself is what the student learns from.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from megatron_ext.tokenizer.build import Tokenizer
from megatron_ext.tokenizer.fold import Fold
from megatron_ext.tokenizer.inside import encode_inside

#: Stretches of tokens that are remembered.
MEMORY = 1 << 18


class Reading(NamedTuple):
    """What the teacher reads, and where its predictions belong.

    Attributes:
        tokens: the teacher's ids, int64 [b, s]; a text that is shorter in them is filled up with its last.
        rows: int64 [b, s]: for each of the student's tokens the place in ``tokens`` after which the teacher
            predicts what follows it; -1 within a token of the teacher.
    """

    tokens: np.ndarray
    rows: np.ndarray


class Rejoin:
    """Student's tokens -> ``Reading``.

    Only stretches in which neighbours are neighbours in some dropped piece are encoded, each by itself.
    """

    def __init__(self, fold: Fold, student: Tokenizer, teacher: Tokenizer) -> None:
        self.fold, self.size = fold, len(fold.teacher_of_student)
        self.texts = student.token_texts()
        self.encode, self.lengths = encode_inside(teacher), teacher.token_bytes().tolist()
        self.neighbours = self._neighbours(student, teacher)
        self._known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def _neighbours(self, student: Tokenizer, teacher: Tokenizer) -> np.ndarray:
        """Sorted ``size * left + right`` of the student's ids that stand side by side in a dropped piece."""
        encode, texts = encode_inside(student), teacher.token_texts()
        kept = np.zeros(len(texts), dtype=bool)
        kept[self.fold.teacher_of_student] = True
        dropped = (encode(texts[i]) or [] for i in np.flatnonzero(~kept))
        keys = {self.size * left + right for parts in dropped for left, right in pairwise(parts)}
        return np.array(sorted(keys), dtype=np.int64)

    def read(self, tokens: np.ndarray) -> Reading:
        """What the teacher reads in place of the student's ``tokens``, int64 [b, s]."""
        read = [self._row(row) for row in tokens]
        filled = [np.pad(ids, (0, len(rows) - len(ids)), mode="edge") for ids, rows in read]
        return Reading(np.stack(filled), np.stack([rows for _, rows in read]))

    def _row(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Teacher's ids, at most s, and rows [s]."""
        ids = self.fold.teacher_of_student[tokens]
        ends = np.ones(len(tokens), dtype=bool)
        keys = tokens[:-1] * self.size + tokens[1:]
        joined = np.append(self.neighbours, -1)[np.searchsorted(self.neighbours, keys)] == keys
        edges = np.flatnonzero(np.diff(joined, prepend=False, append=False)).reshape(-1, 2)
        if len(edges):
            inside = np.append(joined, False) | np.append(False, joined)
            found = [self._remembered(tokens[begin : end + 1]) for begin, end in edges.tolist()]
            ids[inside], ends[inside] = np.concatenate(found, axis=1)
        rows = np.where(ends, np.cumsum(ids >= 0) - 1, -1)
        return ids[ids >= 0], rows

    def _remembered(self, stretch: np.ndarray) -> np.ndarray:
        key = stretch.tobytes()
        if key not in self._known:
            if len(self._known) >= MEMORY:
                self._known.clear()
            self._known[key] = self._encoded(stretch)
        return self._known[key]

    def _encoded(self, stretch: np.ndarray) -> np.ndarray:
        """For each of the student's tokens, int64 [2, n]: the teacher's that ends with it or in it, -1 where
        none does; and 1 where one ends with it."""
        unchanged = np.stack([self.fold.teacher_of_student[stretch], np.ones_like(stretch)])
        texts = [self.texts[i] for i in stretch.tolist()]
        ids = self.encode(b"".join(texts))
        if ids is None:  # begins or ends within a character
            return unchanged
        mine = list(accumulate(map(len, texts)))
        result = np.stack([np.full_like(stretch, -1), np.zeros_like(stretch)])
        for i, end in zip(ids, accumulate(self.lengths[i] for i in ids), strict=True):
            at = bisect_left(mine, end)
            if result[0, at] >= 0:  # two end in one of the student's
                return unchanged
            result[:, at] = i, mine[at] == end
        return result

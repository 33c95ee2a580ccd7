"""A teacher whose vocabulary was cut: its distribution in the student's tokens.

A compact tokenizer (:mod:`compress`) keeps pieces of the full one, with their merges. So the student's tokens
are tokens of the teacher, and whatever the teacher predicts begins with one of them: a piece that was dropped
begins with the first token of the student's encoding of it. Summed over the pieces that begin with it, the
teacher's probabilities are the distribution of the student's next token. What that is worth inside a piece
that was dropped, and how often the student encodes a piece otherwise in its text than alone, stands in
docs/distillation.md; :mod:`rejoin` finds the places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ext.tokenizer.build import Tokenizer
from megatron_ext.tokenizer.inside import encode_inside
from megatron_ext.tokenizer.pieces import pieces


class FoldError(ValueError):
    """The student's tokens are not among the teacher's."""


@dataclass(frozen=True)
class Fold:
    """From a teacher's vocabulary of V_t ids to a student's of V_s; padding is in neither.

    Attributes:
        teacher_of_student: int64 [V_s]: the id of the same piece.
        student_of_teacher: int64 [V_t]: the student's token with which a piece of the teacher begins, itself
            if it was kept; -1 for special tokens that were dropped. These begin no text: the distribution is
            to be divided by the sum of what is left.
    """

    teacher_of_student: np.ndarray
    student_of_teacher: np.ndarray

    def columns(self, padded_size: int) -> np.ndarray:
        """``student_of_teacher`` of an output layer with ``padded_size`` rows, int64; -1 for the padding."""
        padding = padded_size - len(self.student_of_teacher)
        return np.pad(self.student_of_teacher, (0, padding), constant_values=-1)

    def fold(self, probabilities: np.ndarray) -> np.ndarray:
        """Teacher's [..., V_t] -> student's [..., V_s]; the definition, for tests and small cases."""
        folded = np.zeros((*probabilities.shape[:-1], len(self.teacher_of_student)))
        begins = self.student_of_teacher >= 0
        np.add.at(folded, (..., self.student_of_teacher[begins]), probabilities[..., begins])
        return folded / folded.sum(axis=-1, keepdims=True)


def fold(student: Tokenizer, teacher: Tokenizer) -> Fold | None:
    """The fold of a teacher's vocabulary onto a student's; None where both have the same ids.

    Raises:
        FoldError: pieces of the student are not among the teacher's, or a tokenizer has none.
    """
    if student.sha256 == teacher.sha256:
        return None
    try:
        mine, theirs = _named(student), _named(teacher)
        encode = encode_inside(student)
    except ValueError as error:
        raise FoldError(
            f"the student's tokenizer is not the teacher's, and cannot be compared: {error}"
        ) from error
    ids = {piece: i for i, piece in enumerate(theirs)}
    unknown = [name for name, text in mine if (name, text) not in ids]
    if unknown:
        raise FoldError(
            f"{len(unknown)} of the student's {len(mine)} pieces are not among the teacher's {len(theirs)}, "
            f"such as {unknown[0]!r}: a student learns from a teacher of its own tokenizer, or of the one "
            "that its tokenizer was made from by tools/compress_tokenizer.py"
        )
    teacher_of_student = np.array([ids[piece] for piece in mine], dtype=np.int64)
    student_of_teacher = np.full(len(theirs), -1, dtype=np.int64)
    student_of_teacher[teacher_of_student] = np.arange(len(mine))
    if len(mine) == len(theirs) and np.array_equal(teacher_of_student, np.arange(len(mine))):
        return None
    for i in np.flatnonzero(student_of_teacher < 0):
        if text := theirs[i][1]:
            student_of_teacher[i] = (encode(text) or [-1])[0]
    return Fold(teacher_of_student, student_of_teacher)


def _named(tokenizer: Tokenizer) -> list[tuple[str, bytes]]:
    """Of each id the spelling and the bytes; b"" for special tokens."""
    return list(zip(pieces(tokenizer), tokenizer.token_texts(), strict=True))

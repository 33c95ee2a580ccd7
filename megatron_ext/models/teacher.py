"""A frozen model that predicts for a student, over the student's vocabulary."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_ext.kernels import fused
from megatron_ext.kernels.cross_entropy import mask_padding_, width_of_shard
from megatron_ext.kernels.fold import fold_logits, place_logits
from megatron_ext.kernels.gather import gathered
from megatron_ext.kernels.linear import product
from megatron_ext.kernels.teacher_targets import WholeTargets
from megatron_ext.models.gpt_model import PanguModel


class TeacherModel(PanguModel):
    """A model whose last stage ends with the hidden states, from which :meth:`predict` makes logits.

    Hidden states are what is kept of a forward pass: h numbers a token, and not as many as there are words.

    After :meth:`face` each tensor parallel rank has those rows of the output layer whose probabilities belong
    to its shard of the student's vocabulary, so that no logits move between ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head: Tensor | None = None  # [n, h], on the last stage
        self.columns: Tensor | None = None  # int64 [n], in the student's shard; None: as they stand
        self.width = 0  # of the student's shard
        self.meet = False  # whether several rows belong to one column

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The hidden states [s, b, h]; [s / tp, b, h] with sequence parallelism."""
        return hidden_states

    @torch.no_grad()
    def face(self, width: int, student_of_teacher: Tensor | None) -> None:
        """Predict over a student's vocabulary; a collective call of the tensor parallel ranks.

        Args:
            width: columns of each rank's shard of it.
            student_of_teacher: int64 [V_t], the student's token to which the probability of each row of the
                output layer belongs, -1 for none; None if the two vocabularies are one.
        """
        if not self.post_process:
            return
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        ).detach()
        self.width = width
        self.head, self.columns = self._rows_of(weight, student_of_teacher)
        if self.columns is not None:
            kept = self.columns[self.columns >= 0]
            self.meet = len(kept.unique()) < len(kept)
        del self.output_layer

    def _rows_of(self, weight: Tensor, student_of_teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows of the output layer for this rank's shard of the student, and their columns there."""
        group = self.pg_collection.tp
        rows = weight.size(0) * group.size()
        if student_of_teacher is None:
            if weight.size(0) == self.width:
                return weight, None
            student_of_teacher = torch.arange(rows)
            student_of_teacher[self._taking_part(rows) :] = -1
        token = student_of_teacher.to(weight.device)
        columns = token - get_pg_rank(group) * self.width
        columns = columns.masked_fill((token < 0) | (columns < 0) | (columns >= self.width), -1)
        if group.size() == 1:
            return weight, columns
        return gathered(weight, group)[columns >= 0], columns[columns >= 0]

    def _taking_part(self, rows: int) -> int:
        return rows if self.softmax_vocab_size is None else min(rows, self.softmax_vocab_size)

    @torch.no_grad()
    def predict(self, hidden: Tensor, rows: Tensor | None, temperature: float) -> WholeTargets:
        """The distribution softmax(t / T) over the student's vocabulary, this rank's shard of it.

        Args:
            hidden: what the forward pass gave.
            rows: int64 [b, s], for each of the student's tokens the place whose prediction is its target, -1
                for none; None if the places are the same.
        """
        assert self.head is not None  # the last stage's, after face()
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        mask = None
        if rows is not None:
            places = rows.t()[..., None]
            mask, hidden = rows.t() >= 0, hidden.gather(0, places.clamp(min=0).expand_as(hidden))
        if self.config.logits_scaling != 1.0:
            hidden = hidden / self.config.logits_scaling
        fast = hidden.dtype == torch.float32 and fused.supports(hidden, self.head)
        logits = (product if fast else F.linear)(hidden, self.head)
        if self.columns is None:
            first = get_pg_rank(self.pg_collection.tp) * self.width
            logits = mask_padding_(logits, width_of_shard(self.width, first, self.softmax_vocab_size))
        elif self.meet:
            logits = fold_logits(logits, self.columns, self.width, temperature)
        else:
            logits = place_logits(logits, self.columns, self.width)
        return WholeTargets(logits, temperature, mask)

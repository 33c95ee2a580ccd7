"""Microbatches: reading one, the forward step, and the loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.config.data import DataConfig
from megatron_ext.kernels.teacher_targets import TeacherTargets

#: A loss per token; or cross entropy, and divergence from the teacher.
Losses: TypeAlias = Tensor | tuple[Tensor, Tensor]


@dataclass
class Batch:
    """One microbatch; b samples of s tokens."""

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64
    loss_mask: Tensor  # [b, s] float32
    position_ids: Tensor  # [b, s] int64
    document_starts: Tensor | None  # [b, s] int32 (kernels/documents.py); None = one document a sequence
    sample_ids: Tensor | None = None  # [b] int64, where the dataset numbers its samples
    targets: TeacherTargets | None = None  # [s, b, ...], on the last stage of a student with a teacher
    alpha: float = 0.0  # the teacher's share in the loss


#: Microbatches as a data loader makes them, or on the device.
Microbatches: TypeAlias = Iterator[dict[str, Any] | Batch]


def next_batch(iterator: Microbatches | None) -> Batch | None:
    """The next microbatch on this rank's device; None on a stage that needs none."""
    if iterator is None:
        return None
    sample = next(iterator)
    if isinstance(sample, Batch):
        return sample
    device = platform.current_device()
    fields = ("tokens", "labels", "loss_mask", "position_ids", "document_starts", "sample_id")
    tensors: list[Any] = [
        sample[name].to(device, non_blocking=True) if name in sample else None for name in fields
    ]
    return of_context_rank(
        Batch(*tensors),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )


def of_context_rank(batch: Batch, rank: int, size: int) -> Batch:
    """The tokens of one context parallel rank: of 2 x size pieces of the sequence, one from each end.

    Causal attention then costs the same on every rank; Transformer Engine's attention expects this order
    (Megatron-LM: get_batch_on_this_cp_rank).
    """
    if size == 1:
        return batch

    def part(tensor: Tensor, axis: int) -> Tensor:
        pieces = tensor.chunk(2 * size, axis)
        return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]), axis)

    sequences = ("tokens", "labels", "loss_mask", "position_ids")
    changes: dict[str, Tensor] = {name: part(getattr(batch, name), 1) for name in sequences}
    return replace(batch, **changes)


def needs_data(data: DataConfig, vp_stage: int | None = None) -> bool:
    """Whether this pipeline stage reads samples: the first and the last do; all do with document masks."""
    return (
        data.reset_attention_mask
        or parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    )


@dataclass
class LossCounter:
    """Reduces the losses of a microbatch to the training loss and the values to report.

    ``token_bytes`` ([vocabulary] int32: UTF-8 bytes of each id, 0 for special tokens) enables the
    count of bytes, for bits per byte. ``bad`` collects the microbatches of this step whose loss is
    "NaN" or "Inf"; raising here would leave the other ranks waiting in the middle of a schedule.
    ``record`` is called with every microbatch and its losses.
    """

    token_bytes: Tensor | None = None
    record: Callable[[Batch, Tensor], None] | None = None
    bad: dict[int, str] = field(default_factory=dict)
    microbatch: int = 0

    def __call__(self, batch: Batch, losses: Losses) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """[b, s] losses in nats -> (their sum, number of tokens, sums to report).

        With a teacher the sum is of the mixed loss. The sums to report are [cross entropy, tokens], followed
        by [cross entropy over tokens with text, bytes of text], or with a teacher by [divergence, tokens that
        have a target].
        """
        losses, divergence = losses if isinstance(losses, tuple) else (losses, None)
        losses, mask = losses.float(), batch.loss_mask
        entropy = loss = torch.sum(losses * mask)
        tokens = mask.sum().to(torch.int)
        if divergence is not None:
            loss, taught = mixed(batch, losses, divergence.float())
        self._note(loss.detach())
        if self.record is not None:
            self.record(batch, losses.detach())
        sums = [entropy.detach(), tokens]
        if divergence is not None:
            sums += taught
        if self.token_bytes is not None:
            text_bytes = self.token_bytes[batch.labels] * mask
            sums += [torch.sum(losses.detach() * mask * (text_bytes > 0)), text_bytes.sum()]
        return loss, tokens, {"lm loss": torch.stack([value.double() for value in sums])}

    def _note(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self.bad[self.microbatch] = "NaN" if torch.isnan(loss) else "Inf"
        self.microbatch += 1


def mixed(batch: Batch, entropy: Tensor, divergence: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(1 - alpha) cross entropy + alpha T^2 divergence, summed over the tokens (arXiv 1503.02531, section 2).

    Where the teacher has no target the cross entropy counts in full. Both losses are [b, s]. Also returns the
    sum of the divergence, and the number of tokens with a target.
    """
    assert batch.targets is not None  # without them the model computes no divergence
    taught = batch.loss_mask
    if batch.targets.mask is not None:
        taught = taught * batch.targets.mask.transpose(0, 1)
    share = batch.alpha * taught
    divergence = torch.where(taught > 0, divergence, 0.0)  # where there is no target it may be anything
    loss = (batch.loss_mask - share) * entropy + share * batch.targets.temperature**2 * divergence
    return loss.sum(), [(divergence * taught).sum().detach(), taught.sum()]


def forward_step(
    iterator: Microbatches | None, model: nn.Module, counter: LossCounter
) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
    """One microbatch through this stage's chunk, as Megatron-Core's schedules call it.

    Returns the chunk's output and the function that turns the last stage's output into the loss.
    """
    batch = next_batch(iterator)
    if batch is None:
        return model(None, None, None), None
    more = {} if batch.targets is None else {"targets": batch.targets}
    # The starts of documents go where Megatron-Core passes the attention mask from layer to layer.
    output = model(batch.tokens, batch.position_ids, batch.document_starts, labels=batch.labels, **more)
    return output, partial(counter, batch)


def total(reduced: list[dict[str, Tensor]]) -> Tensor | None:
    """Sum the reports over microbatches and data parallel ranks; None except on the last stage."""
    if not reduced:
        return None
    sums = torch.stack([entry["lm loss"] for entry in reduced]).sum(0)
    torch.distributed.all_reduce(
        sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return sums

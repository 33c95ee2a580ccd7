"""Microbatches: reading one, the forward step, and the loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.config.data import DataConfig


@dataclass
class Batch:
    """One microbatch; b samples of s tokens."""

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64
    loss_mask: Tensor  # [b, s] float32
    position_ids: Tensor  # [b, s] int64
    attention_mask: Tensor | None  # [b, 1, s, s] bool, True = forbidden; None = causal
    sample_ids: Tensor | None = None  # [b] int64, where the dataset numbers its samples


def next_batch(iterator: Iterator[dict[str, Any]] | None) -> Batch | None:
    """The next microbatch on this rank's device; None on a stage that needs none."""
    if iterator is None:
        return None
    sample = next(iterator)
    device = platform.current_device()
    fields = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "sample_id")
    tensors = [sample[name].to(device, non_blocking=True) if name in sample else None for name in fields]
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
    if batch.attention_mask is not None:
        changes["attention_mask"] = part(batch.attention_mask, 2)
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

    def __call__(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """[b, s] losses in nats -> (their sum, number of tokens, sums to report).

        The sums are [loss, tokens], followed by [loss over tokens with text, bytes of text].
        """
        losses, mask = losses.float(), batch.loss_mask
        loss = torch.sum(losses * mask)
        tokens = mask.sum().to(torch.int)
        self._note(loss.detach())
        if self.record is not None:
            self.record(batch, losses.detach())
        sums = [loss.detach(), tokens]
        if self.token_bytes is not None:
            text_bytes = self.token_bytes[batch.labels] * mask
            sums += [torch.sum(losses.detach() * mask * (text_bytes > 0)), text_bytes.sum()]
        return loss, tokens, {"lm loss": torch.stack([value.double() for value in sums])}

    def _note(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self.bad[self.microbatch] = "NaN" if torch.isnan(loss) else "Inf"
        self.microbatch += 1


def forward_step(
    iterator: Iterator[dict[str, Any]] | None, model: nn.Module, counter: LossCounter
) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
    """One microbatch through this stage's chunk, as Megatron-Core's schedules call it.

    Returns the chunk's output and the function that turns the last stage's output into the loss.
    """
    batch = next_batch(iterator)
    if batch is None:
        return model(None, None, None), None
    output = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)
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

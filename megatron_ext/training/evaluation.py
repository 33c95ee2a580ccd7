"""Validation: the mean loss of held-out samples, per token and in bits per byte of text."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.training.batch import LossCounter, Microbatches
from megatron_ext.training.state import Evaluation
from megatron_ext.training.step import evaluation_mode, forward_backward, parameters_in_place


@torch.no_grad()
def evaluate(
    iterators: Sequence[Microbatches | None],
    model: list[nn.Module],
    run: RunConfig,
    token_bytes: torch.Tensor,
    passes: Sequence[int],
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate forward only; a collective call.

    ``passes`` are the numbers of microbatches per data parallel rank of each pass through the pipeline.
    ``stop``, a collective call, is checked before each pass; returns None if it ended the evaluation.
    """
    counter = LossCounter(token_bytes=token_bytes)
    total = torch.zeros(4, dtype=torch.float64)
    with parameters_in_place(model, run.parallel), evaluation_mode(model):
        for num_microbatches in passes:
            if stop():
                return None
            sums = forward_backward(
                iterators, model, run, counter, forward_only=True, num_microbatches=num_microbatches
            )
            if sums is not None:
                total += sums.cpu()
    if run.training.empty_unused_memory_level:
        platform.empty_cache()
    loss, tokens, text_loss, text_bytes = total.tolist()
    if not tokens:
        return Evaluation(math.nan, math.nan, 0)
    per_byte = text_loss / math.log(2) / text_bytes if text_bytes else math.nan
    return Evaluation(loss / tokens, per_byte, int(tokens))

"""Validation: the mean loss of held-out samples, and what it costs in bits per byte of text."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_ext.training.batch import LossCounter
from megatron_ext.training.step import evaluation_mode, forward_backward, parameters_in_place


@dataclass
class Evaluation:
    """``lm_loss`` in nats a token; ``bits_per_byte`` of text, comparable between tokenizers.

    Special tokens stand for no text: their loss counts in ``lm_loss`` only, as nanochat's
    evaluate_bpb does. Both are NaN on ranks that do not hold the loss.
    """

    lm_loss: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    iterators: list[Iterator | None],
    model: list[nn.Module],
    args: Namespace,
    token_bytes: torch.Tensor,
    iterations: int,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Forward only over ``iterations`` global batches; a collective call.

    ``stop`` is asked before each batch, on all ranks alike; None if it ended the evaluation.
    """
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    counter = LossCounter(token_bytes=token_bytes)
    total = torch.zeros(4, dtype=torch.float64)
    with parameters_in_place(model, args), evaluation_mode(model):
        for _ in range(iterations):
            if stop():
                return None
            sums = forward_backward(
                iterators, model, args, counter, forward_only=True, num_microbatches=num_microbatches
            )
            if sums is not None:
                total += sums.cpu()
    loss, tokens, text_loss, text_bytes = total.tolist()
    if not tokens:
        return Evaluation(math.nan, math.nan)
    return Evaluation(loss / tokens, text_loss / math.log(2) / text_bytes if text_bytes else math.nan)

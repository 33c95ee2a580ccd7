"""Runs a model on calibration text: the frozen model, and fixed windows of tokens to compare losses on.

Each rank holds the whole model; the text is divided among ranks (data parallelism).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.data.indexed import map_tokens
from megatron_ext.data.manifest import check_dataset
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.models.layer_specs import CHECKPOINT_NAMES
from megatron_ext.tokenizer.build import Tokenizer
from megatron_ext.training.batch import Batch


def frozen_model(run: RunConfig) -> nn.Module:
    """Build the model that ``run`` describes, frozen and without weights."""
    return build_model(transformer_config(run), run, initialized=False)[0].eval().requires_grad_(False)


def fill(model: nn.Module, get: Callable[[str], Tensor]) -> None:
    """Fill every parameter with the tensor that ``get`` returns for its name in checkpoints."""
    for name, parameter in model.named_parameters():
        parameter.copy_(get(checkpoint_name(name)))


def checkpoint_name(name: str) -> str:
    """The name in checkpoints of a model's parameter."""
    for ours, saved in CHECKPOINT_NAMES.items():
        name = name.replace(ours, saved)
    return name


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Losses of a batch's tokens in nats, [b, s] fp32; 0 where the loss mask is 0."""
    losses = model(batch.tokens, batch.position_ids, batch.document_starts, labels=batch.labels)
    return losses.float() * batch.loss_mask


@dataclass(frozen=True)
class TokenWindows:
    """Text in windows of ``length`` tokens; every token except the first is predicted once.

    ``tokens`` [n, length + 1]: consecutive windows overlap by one token. The last window is padded;
    ``counted`` [n, length] marks the labels that are text.
    """

    tokens: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], length: int) -> "TokenWindows":
        """The documents, each with its end, one after the other."""
        ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
        count = max(1, math.ceil((len(ids) - 1) / length))
        filled = np.zeros(count * length + 1, dtype=np.int64)
        filled[: len(ids)] = ids
        counted = np.arange(count * length) < len(ids) - 1
        at = np.arange(count)[:, None] * length + np.arange(length + 1)
        return cls(filled[at], counted.reshape(count, length))

    def batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """The windows of one data parallel rank, ``size`` at a time."""
        device = platform.current_device()
        for start in range(rank * size, len(self.tokens), ranks * size):
            tokens = torch.from_numpy(self.tokens[start : start + size]).to(device)
            counted = torch.from_numpy(self.counted[start : start + size]).float().to(device)
            positions = torch.arange(tokens.size(1) - 1, device=device).expand(len(tokens), -1)
            yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), counted, positions, None)


@dataclass(frozen=True)
class Loss:
    """Mean loss per token in nats, and in bits per byte, which is comparable between tokenizers."""

    nats: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def mean_loss(model: nn.Module, windows: TokenWindows, size: int, token_bytes: np.ndarray) -> Loss:
    """The loss over all windows, ``size`` at a time; a collective call."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    bytes_of = torch.as_tensor(token_bytes, device=platform.current_device())
    sums = torch.zeros(4, dtype=torch.float64)  # loss, tokens, loss of text, bytes of text
    for batch in windows.batches(size, rank, ranks):
        losses = forward(model, batch)
        text = bytes_of[batch.labels] * batch.loss_mask
        sums += (
            torch.stack([losses.sum(), batch.loss_mask.sum(), losses[text > 0].sum(), text.sum()])
            .double()
            .cpu()
        )
    sums = _summed(sums)
    loss, tokens, text_loss, text_bytes = sums.tolist()
    per_byte = text_loss / math.log(2) / text_bytes if text_bytes else math.nan
    return Loss(loss / tokens, per_byte, int(tokens))


def average(values: Tensor) -> Tensor:
    """The mean over data parallel ranks; a collective call."""
    return _summed(values) / parallel_state.get_data_parallel_world_size()


def _summed(values: Tensor) -> Tensor:
    if parallel_state.get_data_parallel_world_size() == 1:
        return values
    moved = values.to(platform.current_device())
    torch.distributed.all_reduce(moved, group=parallel_state.get_data_parallel_group())
    return moved.to(values.device)


def read_documents(prefixes: Sequence[str], tokens: int) -> list[list[int]]:
    """Random documents of each dataset, the same in every run: about ``tokens`` ids, at least one document.

    Random, because corpora are often ordered by source, so that their first documents are similar.
    """
    documents = []
    for prefix in prefixes:
        index = check_dataset(prefix)
        ids, left = map_tokens(prefix, index), -(-tokens // len(prefixes))
        starts, lengths = index.pointers // index.dtype.itemsize, index.lengths
        sampled = np.random.default_rng(0).choice(len(lengths), min(len(lengths), left), replace=False)
        for start, length in zip(starts[sampled].tolist(), lengths[sampled].tolist(), strict=True):
            documents.append(ids[start : start + min(length, left)].tolist())
            left -= length
            if left <= 0:
                break
    return documents


def translated(documents: Sequence[Sequence[int]], source: Tokenizer, target: Tokenizer) -> list[list[int]]:
    """The same texts in the target's ids, with its end of document in the places of the source's."""
    out = []
    for ids in documents:
        ended = len(ids) > 0 and ids[-1] == source.eod
        text = source.detokenize(ids[:-1] if ended else ids)
        out.append(list(target.tokenize(text)) + [target.eod] * ended)
    return out

"""Documents packed into one sequence: where each token's document begins, and the masks that follow from it.

``starts`` [b, s] int32 holds for each token the position of the first token of its document; a token attends
to those from there up to itself. It never falls along a sequence, so that a block of queries sees nothing
before the start of its first query.
"""

import torch
from torch import Tensor


def document_starts(ends: Tensor) -> Tensor:
    """[..., s] int32: the start of each token's document; ``ends`` [..., s] bool marks its last token."""
    after = torch.arange(1, ends.size(-1) + 1, dtype=torch.int32, device=ends.device) * ends
    starts = torch.zeros_like(after)
    starts[..., 1:] = after.cummax(-1).values[..., :-1]
    return starts


def is_starts(mask: Tensor | None) -> bool:
    """Whether an attention mask is given as ``starts``, and not as [b or 1, 1, s, t]."""
    return mask is not None and mask.dim() == 2


def shown(starts: Tensor) -> Tensor:
    """[b, 1, s, s] bool: True where a token attends to another, the inverse of Megatron's attention mask."""
    places = torch.arange(starts.size(1), device=starts.device)
    return ((places >= starts[..., None]) & (places <= places[:, None]))[:, None]


def boundaries(starts: Tensor) -> Tensor:
    """[documents + 1] int32: cumulative lengths of the documents of all sequences, one after another."""
    places = torch.arange(starts.size(1), device=starts.device)
    first = torch.nonzero((starts == places).flatten()).flatten()
    return torch.cat([first, first.new_tensor([starts.numel()])]).int()

"""A teacher's logits over its own vocabulary as logits over a student's, whose tokens gather several each."""

import torch
from torch import Tensor

#: Numbers in flight at once: the exponentials of this many of the teacher's logits.
_CHUNK = 1 << 24


def place_logits(logits: Tensor, columns: Tensor, width: int) -> Tensor:
    """t [..., n] in ``columns`` (int64 [n], distinct; -1 for nowhere) of [..., width], -inf elsewhere."""
    placed = logits.new_full((*logits.shape[:-1], width), -torch.inf)
    kept = columns >= 0
    placed[..., columns[kept]] = logits[..., kept]
    return placed


def fold_logits(logits: Tensor, columns: Tensor, width: int, temperature: float) -> Tensor:
    """u [..., width] with softmax(u / T)_c = sum of softmax(t / T)_i over the i with ``columns[i]`` = c.

    Args:
        logits: t [..., n].
        columns: int64 [n]; -1 for nowhere, and the others are then divided by their sum.
        width: of the result, -inf in the columns that nothing is added to.
    Returns:
        float32, or float64 for float64 logits.
    """
    flat = logits.flatten(0, -2)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    folded = torch.zeros(len(flat), width, dtype=dtype, device=flat.device)
    if not flat.size(-1):
        return folded.fill_(-torch.inf).view(*logits.shape[:-1], width)
    nowhere, column = columns < 0, columns.clamp(min=0)
    rows = max(1, _CHUNK // flat.size(-1))
    for part, out in zip(flat.split(rows), folded.split(rows), strict=True):
        t = part.to(dtype).masked_fill(nowhere, -torch.inf)
        top = t.amax(-1, keepdim=True)
        e = t.sub_(top).div_(temperature).exp_()
        out.scatter_add_(-1, column.expand_as(e), e)
        out.log_().mul_(temperature).add_(top)
    return folded.view(*logits.shape[:-1], width)

"""Selection of the layers to keep (arXiv 2402.02791, section 3.3)."""

import torch
from torch import Tensor

from megatron_ext.inherit.selection import top


def ends(layers: int, keep: int) -> Tensor:
    """The first and the last layers, without the middle; with an odd number, one more of the first.

    According to the paper the first two or three layers and the last few are the most important.
    """
    first = (keep + 1) // 2
    return torch.cat([torch.arange(first), torch.arange(layers - (keep - first), layers)])


def uniform(layers: int, keep: int) -> Tensor:
    """Evenly spaced layers, including the first and the last."""
    if keep == 1:
        return torch.zeros(1, dtype=torch.int64)
    return torch.tensor([round(i * (layers - 1) / (keep - 1)) for i in range(keep)])


def by_importance(losses_without: Tensor, keep: int) -> Tensor:
    """The layers whose removal increases the loss most; ``losses_without`` [L]: the loss without each."""
    return top(losses_without, keep)


def listed(wanted: list[int], layers: int, keep: int) -> Tensor:
    """The layers that the user lists, from 0.

    Raises:
        ValueError: the number of layers is not the target's, or a layer does not exist in the source.
    """
    chosen = sorted(set(wanted))
    if len(chosen) != len(wanted) or len(wanted) != keep:
        raise ValueError(f"--layers names {len(chosen)} different layers, the target has {keep}")
    if chosen[0] < 0 or chosen[-1] >= layers:
        raise ValueError(f"--layers: the source has the layers 0 to {layers - 1}, not {wanted}")
    return torch.tensor(chosen)

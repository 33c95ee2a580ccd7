"""The units of the source model that the target keeps."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Indices into the source, ascending, int64. L', h', f', g', b': the target's counts.

    ``ffn``, ``groups`` and ``bottleneck`` have a row for each kept layer, in the order of ``layers``.
    """

    layers: Tensor  # [L']
    hidden: Tensor  # [h'], one selection for the whole residual stream
    ffn: Tensor  # [L', f']
    groups: Tensor  # [L', g']
    bottleneck: Tensor  # [L', b'], units of the augmented shortcuts; b' = 0 if the source has none

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value.diff(dim=-1) > 0).all():
                raise ValueError(f"{field.name} must be ascending, each index once")

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, to be saved."""
        return {field.name: getattr(self, field.name).numpy() for field in fields(self)}


def top(scores: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` highest scores along the last axis, ascending; ties go to the first.

    [..., n] -> [..., count].
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values

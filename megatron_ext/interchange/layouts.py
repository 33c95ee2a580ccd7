"""The layouts of the tensors of a Hugging Face folder in ours.

Same         one tensor, as it is
Groups       queries, keys and values, interleaved by query group: [q ... q, k, v] of group 0, of group 1, ...
FusedGroups  the same from one tensor with all queries, then all keys, then all values (Phi-3)
Stack        one below the other: [gate; up]
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig

Size = tuple[int, ...]


class Same:
    """One tensor, as it is."""

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """Theirs -> ours."""
        return parts[0]

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """Ours -> theirs."""
        return [tensor]

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """The sizes of theirs, from the size of ours."""
        return [size]


class Groups(Same):
    """Queries, keys and values; ours is [g * (n/g + 2) * d, h], or without h for the biases.

    Shapes: g query groups, n heads, d channels a head, h hidden.
    """

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """[n * d, h], [g * d, h], [g * d, h] -> [g * (n/g + 2) * d, h]."""
        by_group = [part.unflatten(0, (model.query_groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """The inverse of ``join``."""
        d, queries = model.kv_channels, model.heads_per_group
        by_group = tensor.unflatten(0, (model.query_groups, -1))
        return [part.flatten(0, 1) for part in by_group.split([queries * d, d, d], dim=1)]

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """[n * d, h], [g * d, h], [g * d, h]."""
        heads = (model.num_attention_heads, model.query_groups, model.query_groups)
        return [(count * model.kv_channels, *size[1:]) for count in heads]


class FusedGroups(Groups):
    """Queries, keys and values of all groups in one tensor, one below the other."""

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """[(n + 2 * g) * d, h] -> [g * (n/g + 2) * d, h]."""
        rows = [size[0] for size in Groups.sizes(parts[0].size(), model)]
        return Groups.join(list(parts[0].split(rows)), model)

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """The inverse of ``join``."""
        return [torch.cat(Groups.split(tensor, model))]

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """[(n + 2 * g) * d, h]."""
        return [size]


class Stack(Same):
    """Two tensors of the same size, one below the other."""

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """[f, h], [f, h] -> [2 * f, h]."""
        return torch.cat(parts)

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """The inverse of ``join``."""
        return list(tensor.chunk(2))

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """[f, h] twice."""
        return [(size[0] // 2, *size[1:])] * 2

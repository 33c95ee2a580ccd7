"""The shards of a tensor, from all ranks of a group."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.kernels.cross_entropy import Group


def gathered(shard: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Every rank's ``shard``, all of one size, side by side along ``dim``; a collective call of ``group``."""
    if group is None or group.size() == 1:
        return shard
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim)

"""Initial weights that do not depend on how many devices hold them.

Megatron-LM seeds each rank by its place (seed + 100 * pp_rank + tp_rank), so that the same seed
gives another model on another layout: the first losses move by 0.06 in our runs. Here each
parameter is drawn at its full shape by a generator seeded with the run's seed and the parameter's
name, and every rank keeps its slice. Which slice that is, the model already says in the
description it gives to checkpoints (``sharded_state_dict``): a fresh model is a checkpoint that is
drawn instead of read.

The draw happens on the CPU in fp32 on every machine, so a model does not depend on the device
either.
"""

import hashlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megatron_ext.models.config import PanguProConfig

#: Draws a tensor in place; takes ``generator``.
Draw = Callable[..., Tensor]


def draws(config: PanguProConfig) -> dict[str, Draw | None]:
    """Checkpoint name pattern -> how the parameter is drawn; None keeps the value it was built with.

    The standard deviations are Megatron-LM's: ``--init-method-std``, divided by sqrt(2 * layers)
    for the projections that write into the residual stream.
    """
    identity = config.pangu_init == "identity"
    series = partial(_normal_divided, std=config.init_method_std, by=max(1, config.series_activation_order))
    return {
        "embedding.*.weight": config.embedding_init_method,
        "output_layer.weight": config.init_method,
        "*.linear_qkv.weight": config.init_method,
        "*.linear_fc1.weight": config.init_method,
        "*.linear_proj.weight": config.output_layer_init_method,
        "*.linear_fc2.weight": config.output_layer_init_method,
        "*.augmented_shortcut.down": config.init_method,
        "*.augmented_shortcut.up": nn.init.zeros_ if identity else config.output_layer_init_method,
        "*.series_activation.scale": None if identity else series,
        "*.series_activation.bias": None,
        "*norm*.weight": None,
        "*layer_norm_weight": None,
        "*norm*.bias": None,
        "*layer_norm_bias": None,
        "*.bias": nn.init.zeros_,
    }


def _normal_divided(tensor: Tensor, std: float, by: int, generator: torch.Generator | None = None) -> Tensor:
    return nn.init.normal_(tensor, 1.0, std, generator=generator).div_(by)


def sharding_metadata() -> dict[str, Any]:
    """What ``sharded_state_dict`` needs to know: layers by number, and who holds the same shard."""
    return {
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def described(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[ShardedTensor]]]:
    """Each parameter of ``model`` with the shards of it that this rank holds.

    A shard's ``data`` is a view of the parameter, its ``key`` the name in checkpoints; the gate and
    the up projection of ``linear_fc1`` are two shards of one parameter.
    """
    parameters = dict(model.named_parameters())
    for name, entry in model.sharded_state_dict(metadata=sharding_metadata()).items():
        if isinstance(entry, ShardedTensorFactory):
            yield parameters[name], entry.build()
        elif isinstance(entry, ShardedTensor) and name in parameters:
            yield parameters[name], [entry]


def shards(model: nn.Module) -> Iterator[ShardedTensor]:
    """Every shard of every parameter of ``model`` on this rank."""
    for _, found in described(model):
        yield from found


def mark_split_parameters(model: nn.Module) -> None:
    """Say of each parameter whether it is split over tensor parallel ranks, and along which axis.

    Megatron-Core's layers do so only while they draw weights. The norm of the gradients counts a
    parameter that is not marked as split on the first rank only: forgetting it clips by a norm that
    is too small, without any other sign.
    """
    for parameter, found in described(model):
        pieces = len(found)
        shape = zip(found[0].local_shape, found[0].global_shape, strict=True)
        axes = [
            axis for axis, (mine, full) in enumerate(shape) if mine * (pieces if axis == 0 else 1) != full
        ]
        parameter.tensor_model_parallel = bool(axes)
        parameter.partition_dim = axes[0] if axes else -1
        parameter.partition_stride = pieces


@torch.no_grad()
def initialize(model: nn.Module, config: PanguProConfig, seed: int) -> None:
    """Draw the initial weights of one pipeline stage's model chunk, independently of the layout.

    Raises:
        LookupError: a parameter has no rule, and would have kept whatever was in memory.
    """
    rules = draws(config)
    for parameter, found in described(model):
        drawn = [_sampled(shard, rules, seed) for shard in found]
        if drawn[0] is None:
            continue
        # As a whole: the halves of a parameter in FP8 are copies, not views.
        whole = torch.cat(drawn) if len(drawn) > 1 else drawn[0]
        parameter.copy_(whole)
        if hasattr(parameter, "_high_precision_init_val"):
            # What Transformer Engine kept from before the rounding to FP8, and the optimizer starts from. The
            # distributed one views it flat, and a window would keep the whole draw in memory.
            parameter._high_precision_init_val = whole.clone(memory_format=torch.contiguous_format)


def _sampled(shard: ShardedTensor, rules: dict[str, Draw | None], seed: int) -> torch.Tensor | None:
    """This rank's window of a parameter that is drawn at its full shape; None keeps what is there."""
    draw = _rule_for(shard.key, rules)
    if draw is None:
        return None
    full = torch.empty(shard.global_shape)
    if draw is nn.init.zeros_:
        full.zero_()
    else:
        draw(full, generator=torch.Generator().manual_seed(parameter_seed(seed, shard.key)))
    window = tuple(
        slice(offset, offset + length)
        for offset, length in zip(shard.global_offset, shard.local_shape, strict=True)
    )
    return full[window]


def parameter_seed(seed: int, name: str) -> int:
    """The 63-bit seed of one parameter's draw."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _rule_for(name: str, rules: dict[str, Draw | None]) -> Draw | None:
    for pattern, draw in rules.items():
        if fnmatchcase(name, pattern):
            return draw
    raise LookupError(f"no initialisation is defined for the parameter {name}")

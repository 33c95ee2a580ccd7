"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    B <- m B + (1 - m) G         U = NS(m B + (1 - m) G)    with Nesterov's momentum, else NS(B)
    W <- (1 - lr wd) W - lr s(U) U

NS is the Newton-Schulz iteration of ``torch.optim.Muon``: five steps take the singular values of a matrix to
about 1. s is the scale by shape of Megatron-Core's --muon-scale-mode. This is for hidden matrices; embedding,
output layer, vectors and the scales of the series activation get AdamW, in the same optimizer.

Shards of a matrix are gathered over tensor parallel ranks before NS, so that its update does not depend on
the layout. Query, key and value of the joint projection are matrices of their own, and so are gate and up.
The rows of such a part may come in any order, as NS(P U) = P NS(U) for a permutation P.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronConfig
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.kernels.gather import gathered
from megatron_ext.training.adam import FusedAdam

#: Marks the group of matrices. Of the keys by which Megatron-Core tells parameter groups apart when it loads
#: them this one has no other use.
MATRICES = "is_decoupled_lr"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Parts:
    """How the parts of a weight [rows, columns] lie in it: ``groups`` times ``rows[i]`` rows of each."""

    groups: int
    rows: tuple[int, ...]

    def split(self, weight: Tensor) -> list[Tensor]:
        """The parts, each [groups * rows, columns]."""
        grouped = weight.view(self.groups, sum(self.rows), weight.size(1))
        return [part.reshape(-1, weight.size(1)) for part in grouped.split(self.rows, dim=1)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The weight again."""
        columns = parts[0].size(1)
        return torch.cat([part.view(self.groups, -1, columns) for part in parts], dim=1).view(-1, columns)


def mark_matrices(chunks: Iterable[nn.Module], split_qkv: bool) -> None:
    """Give every parameter that Muon updates its ``muon_parts``."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if is_hidden_matrix(name, parameter):
                parameter.muon_parts = _parts_of(name, parameter, chunk.config, split_qkv)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix, and none of embedding, output layer and scales."""
    vocabulary = "embedding" in name or "output_layer" in name
    return parameter.dim() == 2 and not vocabulary and not getattr(parameter, "no_weight_decay", False)


def _parts_of(name: str, parameter: Tensor, config: Any, split_qkv: bool) -> Parts:
    rows = parameter.size(0)
    if "linear_fc1" in name and config.gated_linear_unit:
        return Parts(1, (rows // 2, rows // 2))
    if "linear_qkv" in name and split_qkv:
        width = config.kv_channels
        block = (config.num_attention_heads // config.num_query_groups * width, width, width)
        return Parts(rows // sum(block), block)
    return Parts(1, (rows,))


def carry_parts(optimizer: MegatronOptimizer) -> None:
    """Fp32 copies of bf16 weights get the marks of the weights."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(inner, Float16OptimizerWithFloat16Params):
            models, copies = chain(*inner.float16_groups), chain(*inner.fp32_from_float16_groups)
            for model, copy in zip(models, copies, strict=True):
                if hasattr(model, "muon_parts"):
                    copy.muon_parts = model.muon_parts


class Muon(FusedAdam):
    """Muon for the parameter group that is marked, AdamW for the others; the arguments are FusedAdam's."""

    options: MegatronConfig

    @classmethod
    def with_options(cls, options: MegatronConfig) -> type["Muon"]:
        """A class with these options, which Megatron-Core can make as it makes its Adam."""
        return type("Muon", (cls,), {"options": options})

    def update(self, group: dict[str, Any]) -> None:
        if not group[MATRICES]:
            return super().update(group)
        params = [p for p in group["params"] if p.grad is not None]
        pieces = [_Piece.of(p, part) for p in params for part in p.muon_parts.split(self._momentum(p))]
        whole = [piece.gathered() if self._gathers else piece.part for piece in pieces]
        updates = orthogonalized(whole, self.options.muon_num_ns_steps)
        scaled = map(self._scaled, updates, pieces)
        for p in params:
            parts = [next(scaled) for _ in p.muon_parts.rows]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(p.muon_parts.join(parts), alpha=-group["lr"])

    def _momentum(self, p: Tensor) -> Tensor:
        """B with this step's gradient in it; a step ahead with Nesterov's momentum."""
        m = self.options.muon_momentum
        buffer = self.moment(p, "momentum_buffer").lerp_(p.grad, 1 - m)
        return p.grad.lerp(buffer, m) if self.options.muon_use_nesterov else buffer

    @property
    def _gathers(self) -> bool:
        return self.options.muon_tp_mode == "duplicated"

    def _scaled(self, update: Tensor, piece: "_Piece") -> Tensor:
        """This rank's shard of an update, times the scale of the whole."""
        factor = scale(update.size(0), update.size(1), self.options.muon_scale_mode)
        shard = piece.shard_of(update) if self._gathers else update
        return shard * (factor * self.options.muon_extra_scale_factor)


@dataclass(frozen=True)
class _Piece:
    """A part of a momentum on this rank; ``axis`` is split over tensor parallel ranks, None if none is."""

    part: Tensor
    axis: int | None

    @classmethod
    def of(cls, parameter: Tensor, part: Tensor) -> "_Piece":
        split = parallel_state.get_tensor_model_parallel_world_size() > 1 and parameter.tensor_model_parallel
        return cls(part, parameter.partition_dim if split else None)

    def gathered(self) -> Tensor:
        """The part as the whole layer has it."""
        if self.axis is None:
            return self.part
        return gathered(self.part, parallel_state.get_tensor_model_parallel_group(), self.axis)

    def shard_of(self, whole: Tensor) -> Tensor:
        """This rank's shard."""
        if self.axis is None:
            return whole
        group = parallel_state.get_tensor_model_parallel_group()
        return whole.chunk(group.size(), dim=self.axis)[group.rank()]


def orthogonalized(matrices: list[Tensor], steps: int) -> Iterator[Tensor]:
    """NS of each matrix, fp32; those of one shape are iterated together."""
    by_shape = defaultdict(list)
    for place, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(place)
    found: dict[int, Tensor] = {}
    for places in by_shape.values():
        stacked = newton_schulz(torch.stack([matrices[place] for place in places]), steps)
        found |= zip(places, stacked.unbind(), strict=True)
    return (found[place] for place in range(len(matrices)))


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """U V^T of x = U S V^T, nearly: singular values end between about 0.7 and 1.2. [k, m, n] -> the same.

    The arithmetic of torch.optim.Muon, in bf16 on a GPU as there; in fp32 on a CPU, where that is as fast.
    """
    a, b, c = COEFFICIENTS
    out = x.bfloat16() if platform.on_gpu() else x.float()
    tall = x.size(-2) > x.size(-1)
    out = out.mT if tall else out
    out = out / torch.linalg.matrix_norm(out, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(out, out.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        out = torch.baddbmm(out, gram, out, beta=a)
    return (out.mT if tall else out).to(x.dtype)


def scale(rows: int, columns: int, mode: str) -> float:
    """The factor of an update by the shape of its matrix, as Megatron-Core's modes are defined.

    ``spectral`` makes entries as large as AdamW's with --muon-extra-scale-factor 0.2 (arXiv 2502.16982, 2.2).
    """
    return {
        "spectral": math.sqrt(max(rows, columns)),
        "unit_rms_norm": math.sqrt(rows / columns),
        "shape_scaling": math.sqrt(max(1.0, rows / columns)),
    }[mode]


class LayerWise(LayerWiseDistributedOptimizer):
    """Megatron-Core's, on a CPU too: gloo gathers tensors of one size only, so each is sent in turn there."""

    def allgather_params(self) -> None:
        if platform.on_gpu():
            super().allgather_params()
        else:
            self.broadcast_params()

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **options: Any
    ) -> Any:
        """As the class above describes it for bf16; its fp32 form is not written for checkpoints."""
        if self.config.bf16:
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **options)
        state = ChainedOptimizer.sharded_state_dict(self, model_sharded_state_dict, is_loading, **options)
        for entry in nested_values(state):
            if isinstance(
                entry, ShardedTensor | ShardedTensorFactory
            ):  # there is no copy of it on another data parallel rank
                entry.replica_id = (*entry.replica_id[:-1], 0)
        return state


def zero_state(optimizer: torch.optim.Optimizer, _config: object = None) -> None:
    """Zero moments where there are none yet, so that a checkpoint can be read into them."""
    for group in optimizer.param_groups:
        names = ("momentum_buffer",) if group[MATRICES] else ("exp_avg", "exp_avg_sq")
        for p in group["params"]:
            for name in names:
                optimizer.state[p].setdefault(name, torch.zeros_like(p, requires_grad=False))

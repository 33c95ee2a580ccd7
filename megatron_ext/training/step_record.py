"""Records the first steps of a run on disk: losses, gradients and parameters.

``layout_check.py`` compares two such records. A folder holds, for each rank, ``rank_R.json`` and, for each
step, ``step_N_rank_R.safetensors`` with the rank's shards of every gradient and of every parameter after the
update, in fp32. Data parallel replicas are compared while they are recorded, and written once.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_ext.models.builder import unwrap
from megatron_ext.models.initialization import described
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.signals import StopSignals
from megatron_ext.training.state import StepResult
from megatron_ext.training.step import parameters_in_place


@dataclass
class RankRecord:
    """``rank_R.json``: the values of rank ``rank`` of ``world_size``.

    Attributes:
        dtype: the number format of the parameters.
        losses, grad_norms: by step; the loss is None on ranks without the last pipeline stage.
        replicas: "gradient ..." or "parameter ..." -> the largest relative difference between a data
            parallel rank's copy and the first rank's, in any step.
    """

    rank: int
    world_size: int
    dtype: str
    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    replicas: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A rank's part of a tensor: its ``name`` in checkpoints, the full ``shape``, its ``offset``."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor

    @property
    def label(self) -> str:
        """Name, shape and offset in one string, the key in the files."""
        return f"{self.name} {'x'.join(map(str, self.shape))} {'x'.join(map(str, self.offset))}"

    @classmethod
    def of(cls, label: str, values: Tensor) -> "Shard":
        """A shard from its :attr:`label`."""
        name, shape, offset = label.rsplit(" ", 2)
        return cls(name, _sizes(shape), _sizes(offset), values)


class StepRecorder(Callback):
    """Records the first ``steps`` steps into ``folder``, then stops the run."""

    def __init__(self, folder: Path, steps: int, signals: StopSignals):
        self.folder, self.steps, self.signals = folder, steps, signals

    def start(self, state: State) -> None:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.state, self.gradients = state, dict[str, Tensor]()
        self.record = RankRecord(rank, world, str(state.run.precision.params_dtype).removeprefix("torch."))

    def before_update(self) -> None:
        """Record the gradients that the optimizer receives: summed over microbatches, averaged over data."""
        if self.state.run.parallel.use_distributed_optimizer:
            _gather_reduced_shares(self.state.model)
        self.gradients = self._whole("gradient")

    def after_step(self, state: State, result: StepResult) -> None:
        with parameters_in_place(state.model, state.run.parallel):
            tensors = self.gradients | self._whole("parameter")
        self.record.losses.append(None if result.lm_loss != result.lm_loss else result.lm_loss)
        self.record.grad_norms.append(result.grad_norm)
        step = len(self.record.losses)
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            save_file(tensors, self.folder / f"step_{step}_rank_{self.record.rank}.safetensors")
        self.gradients = {}
        if step == self.steps:
            self.signals.request(f"word that {step} steps are recorded")

    def close(self) -> None:
        path = self.folder / f"rank_{self.record.rank}.json"
        path.write_text(json.dumps(asdict(self.record)), encoding="utf-8")

    def _whole(self, kind: str) -> dict[str, Tensor]:
        """Label -> this rank's shards; also compares them with the data parallel replicas."""
        tensors = {}
        for chunk in self.state.model:
            for shard in shards_of(unwrap(chunk), kind):
                self._compare_replicas(shard)
                tensors[shard.label] = shard.values.cpu()
        return tensors

    def _compare_replicas(self, shard: Shard) -> None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() == 1:
            return
        first = shard.values.clone()
        torch.distributed.broadcast(first, torch.distributed.get_global_rank(group, 0), group)
        error = relative_error(shard.values, first)
        self.record.replicas[shard.name] = max(error, self.record.replicas.get(shard.name, 0.0))


def shards_of(chunk: nn.Module, kind: str) -> Iterator[Shard]:
    """The rank's shards of each parameter, "parameter", or of its accumulated "gradient"; fp32 copies."""
    for parameter, found in described(chunk):
        source = parameter.main_grad if kind == "gradient" else parameter.data
        for shard in found:
            view = shard.data  # of the parameter; the gradient gets the same view
            begin = source.storage_offset() + view.storage_offset() - parameter.storage_offset()
            values = source.as_strided(view.size(), view.stride(), begin).detach()
            values = values.to(torch.float32, copy=True).contiguous()
            yield Shard(f"{kind} {shard.key}", tuple(shard.global_shape), tuple(shard.global_offset), values)


def _gather_reduced_shares(model: list[nn.Module]) -> None:
    """Gather every rank's gradients: with the distributed optimizer each rank has one shard of a bucket."""
    for bucket in (bucket for chunk in model for buffer in chunk.buffers for bucket in buffer.buckets):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=group)


def relative_error(values: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """|values - reference| / max(|reference|, floor), with the Euclidean norm; 0 if both are 0."""
    difference = torch.linalg.vector_norm((values - reference).double()).item()
    size = max(torch.linalg.vector_norm(reference.double()).item(), floor)
    return difference / size if size else (float("inf") if difference else 0.0)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))

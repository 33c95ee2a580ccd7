"""Calculates the communication of a training step from the model's shape and its layout.

Lists every collective of one step on one rank, with the size of its whole tensor. The bytes that a rank sends
are those of the ring algorithms: an all-reduce of n bytes among p ranks sends 2 (p - 1) / p n, a gather
or a scatter half of it. tests/distributed/test_communication.py compares the list with the
collectives that a run calls. docs/scaling.md shows the results for the 1.5B model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config.describe import Layout, final_norm, parameters_of_rank, parts
from megatron_ext.config.model import ModelConfig


@dataclass(frozen=True)
class Collective:
    """``times`` calls of one operation per step, each on a tensor of ``size`` bytes over ``ranks``."""

    dimension: str
    operation: str
    size: float
    times: float
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends per step, with ring algorithms."""
        share = {"send": 1.0, "all_reduce": 2 * (self.ranks - 1) / self.ranks}
        return self.times * self.size * share.get(self.operation, (self.ranks - 1) / self.ranks)


def collectives(model: ModelConfig, layout: Layout, stage: int = 0) -> list[Collective]:
    """The collectives of one step on a rank of a pipeline stage; only those that grow with the model."""
    calls = [*_tensor(model, layout, stage), *_pipeline(model, layout, stage), *_data(model, layout, stage)]
    return [collective for collective in calls if collective.times]


def bytes_sent(model: ModelConfig, layout: Layout) -> dict[str, float]:
    """Dimension -> bytes that a rank sends per step, on the pipeline stage that sends most."""
    totals = []
    for stage in range(layout.pipeline):
        total = dict.fromkeys(("tensor", "pipeline", "data"), 0.0)
        for collective in collectives(model, layout, stage):
            total[collective.dimension] += collective.sent
        totals.append(total)
    return max(totals, key=lambda total: sum(total.values()))


def _activation(model: ModelConfig, layout: Layout) -> float:
    """Bytes of the residual stream of one micro batch, [s, b, h]."""
    return layout.micro_batch * layout.seq_length * model.hidden_size * layout.bytes_each


def _tensor(model: ModelConfig, layout: Layout, stage: int) -> Iterator[Collective]:
    """Attention and FFN each end with an all-reduce, in the forward and in the backward pass.

    Sequence parallelism replaces it by a gather before and a scatter after, with the same number of bytes,
    and gathers the inputs of both column parallel layers again for their weights' gradients. It also reduces
    the gradients of the vectors and shortcuts that are replicated on every rank, once per step.
    """
    p = layout.tensor
    if p == 1:
        return
    size, batches = _activation(model, layout), layout.micro_batches
    layers = layout.layers(model, stage) * batches
    first, last = (stage == 0) * batches, (stage == layout.pipeline - 1) * batches
    forwards = 2 if layout.recompute else 1
    if not layout.sequence_parallel:
        yield Collective("tensor", "all_reduce", size, 2 * (forwards + 1) * layers + first + last, p)
        return
    yield Collective("tensor", "all_gather", size, 2 * (forwards + 2) * layers + first + 2 * last, p)
    yield Collective("tensor", "reduce_scatter", size, 2 * (forwards + 1) * layers + first + last, p)
    of = parts(model)
    last_norm = final_norm(model)
    whole = (of["augmented shortcuts"] + of["norms"] - last_norm) / model.num_layers
    whole *= layout.layers(model, stage)
    whole += last_norm if stage == layout.pipeline - 1 else 0
    yield Collective("tensor", "all_reduce", 4 * whole, 1, p)


def _pipeline(model: ModelConfig, layout: Layout, stage: int) -> Iterator[Collective]:
    """The residual stream from each chunk to the next, and its gradient to the previous one."""
    size = _activation(model, layout) / (layout.tensor if layout.sequence_parallel else 1)
    ways = 2 * len(layout.chunks(model, stage)) - (stage == 0) - (stage == layout.pipeline - 1)
    yield Collective("pipeline", "send", size, ways * layout.micro_batches, layout.pipeline)


def _data(model: ModelConfig, layout: Layout, stage: int) -> Iterator[Collective]:
    """Gradients in fp32 once per step; with the distributed optimizer also the updated parameters."""
    d, held = layout.data, parameters_of_rank(model, layout, stage)
    if d == 1:
        return
    if layout.distributed_optimizer:
        yield Collective("data", "reduce_scatter", 4 * held, 1, d)
        yield Collective("data", "all_gather", layout.bytes_each * held, 1, d)
    else:
        yield Collective("data", "all_reduce", 4 * held, 1, d)

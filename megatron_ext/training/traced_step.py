"""Runs the step for trace.py, in a process that does nothing else (platform/fake.py)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import get_process_group_ranks

from megatron_ext.config import RunConfig
from megatron_ext.models.builder import build_model, ddp_config, regularized, wrap_for_training
from megatron_ext.models.config import transformer_config
from megatron_ext.platform import fake
from megatron_ext.training import distributed
from megatron_ext.training.batch import needs_data
from megatron_ext.training.callbacks import Callback, Callbacks
from megatron_ext.training.optimizer import build_optimizer, optimizer_config
from megatron_ext.training.schedule import build_scheduler
from megatron_ext.training.step import train_step


def run_rank(run: RunConfig, triton: bool) -> dict[str, Any]:
    """Run a step as the rank that ``run`` names; returns the measured fields of a Trace."""
    fake.join(run.process.rank, run.process.world_size)
    fake.act_as_gpu()
    distributed.initialize(run)
    with fake.tensors(triton) as memory:
        return _step(run, memory)


class _BeforeUpdate(Callback):
    """Notes the memory of forward and backward: at the peak (``peak``) and at the end (``left``)."""

    def __init__(self, memory: fake.Memory) -> None:
        self.memory = memory
        memory.reset_peak()

    def before_update(self) -> None:
        self.peak, self.left = self.memory.peak, self.memory.now
        self.memory.reset_peak()


def _step(run: RunConfig, memory: fake.Memory) -> dict[str, Any]:
    """Build the model and train it for one step, measuring the memory in between."""
    config = transformer_config(run)
    chunks = regularized(build_model(config, run, initialized=False), run.optimizer)
    model = wrap_for_training(chunks, config, ddp_config(run))
    built = memory.now
    optimizer = build_optimizer(optimizer_config(run), model)
    scheduler = build_scheduler(optimizer, run.schedule, run.optimizer)
    start, passes = memory.now, _BeforeUpdate(memory)
    window = run.model.window_size[0] if run.model.window_size else None
    with fake.counted_flops(window) as counter:
        train_step(_iterators(run, len(model)), model, optimizer, scheduler, run, Callbacks([passes]))
    parameters = {
        f"{number}.{name}": parameter
        for number, chunk in enumerate(model)
        for name, parameter in chunk.module.named_parameters()
    }
    weights = _bytes(parameters.values())
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "groups": _groups(),
        "shapes": {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        "flops": counter.get_total_flops(),
        "memory": {
            "weights": weights,
            "gradients": built - weights,
            "optimizer": start - built + memory.now - passes.left,
            "activations": passes.peak - start,
        },
        "update": memory.peak - memory.now,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, which they may share."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _groups() -> dict[str, list[int]]:
    groups: dict[str, Any] = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    return {name: get_process_group_ranks(group) for name, group in groups.items()}


def _iterators(run: RunConfig, chunks: int) -> list[Iterator[dict[str, Any]] | None]:
    """Samples for each chunk that reads data."""
    stages = range(chunks) if chunks > 1 else [None]
    return [_samples(run) if needs_data(run.data, vp_stage=stage) else None for stage in stages]


def _samples(run: RunConfig) -> Iterator[dict[str, Tensor]]:
    shape = (run.training.micro_batch_size, run.data.seq_length)
    while True:
        ids = torch.zeros(shape, dtype=torch.int64)
        sample = {"tokens": ids, "labels": ids, "position_ids": ids, "loss_mask": torch.ones(shape)}
        yield sample | ({"document_starts": ids.int()} if run.data.reset_attention_mask else {})

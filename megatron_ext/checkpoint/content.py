"""The content of a checkpoint, under Megatron-LM's names.

Common part (``common.pt``): run, checkpoint_version, iteration, optimizer (parameter groups),
opt_param_scheduler, num_floating_point_operations_so_far, content_metadata, and our own
``pangu_pro``. Sharded part: model (model0, model1, ... with interleaved stages), optimizer state,
rng_state.
"""

import logging
import random
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megatron_ext import platform
from megatron_ext.checkpoint.errors import CheckpointError
from megatron_ext.checkpoint.saved_args import arguments_of, plain
from megatron_ext.config import RunConfig, model_function
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_function import Saved
from megatron_ext.config.output import CheckpointConfig
from megatron_ext.models.builder import unwrap

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 3.0
#: The position of a run; upstream keeps these in the checkpoint's args.
_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


class Scheduler(Protocol):
    """The interface of the learning rate scheduler in ``training/schedule.py``."""

    def state_dict(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any], saved: Saved, run: RunConfig) -> None: ...


def content_metadata(optimizer: MegatronOptimizer | None, config: CheckpointConfig) -> dict[str, Any]:
    """How tensors are stored in the checkpoint, under upstream's keys."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if optimizer is not None and any(
        isinstance(o, DistributedOptimizer) for o in inner_optimizers(optimizer)
    ):
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        name = "distrib_optim_fully_reshardable_mem_efficient"
        metadata[name] = config.distrib_optim_fully_reshardable_mem_efficient
    return metadata


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chained optimizer, or the optimizer itself."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def make_state(optimizer: MegatronOptimizer) -> None:
    """Create the zero moments of an optimizer that has made no step yet, so that they can be saved."""
    for inner in inner_optimizers(optimizer):
        if inner.init_state_fn is not None and not getattr(inner, "is_stub_optimizer", False):
            inner.init_state_fn(inner.optimizer, inner.config)


def model_part(model: list[nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    """The model's sharded tensors: ``model``, or ``model0``, ``model1``, ... with several chunks."""
    chunks = [unwrap(chunk) for chunk in model]
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)
    }


def rng_object(states: list[dict[str, Any]] | None) -> ShardedObject:
    """The generator states of one tensor x pipeline rank: a list over its data parallel ranks."""
    pp, tp = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    offset = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", states, (pp, tp), offset, replica_id=replica)


def gather_rng() -> list[dict[str, Any]]:
    """The states of all generators of each data parallel rank; collective."""
    own = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": platform.rng_state()["device"],
        "rng_tracker_states": _tracked_states(),
    }
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states: list[dict[str, Any]] = [{}] * group.size()
    torch.distributed.all_gather_object(states, own, group=group)
    return states


def _tracked_states() -> dict[str, torch.Tensor]:
    """The states of Megatron-Core's tracker, which holds generators if CUDA graphs are used."""
    states = tensor_parallel.get_cuda_rng_tracker().get_states().items()
    return {name: kept.get_state() if isinstance(kept, torch.Generator) else kept for name, kept in states}


def restore_rng(states: list[dict[str, Any]]) -> None:
    """Set this rank's generators from the result of :func:`gather_rng`.

    Upstream's checkpoints have one entry for all data parallel ranks. The states of CPU and GPU generators
    are not interchangeable: on another kind of device than the one that saved, the device's generators
    continue from the seed.
    """
    own = states[parallel_state.get_data_parallel_rank(with_context_parallel=True) % len(states)]
    random.setstate(own["random_rng_state"])
    numpy.random.set_state(own["np_rng_state"])
    torch.set_rng_state(own["torch_rng_state"])
    if own["cuda_rng_state"].numel() != platform.rng_state()["device"].numel():
        if torch.distributed.get_rank() == 0:
            logger.warning(
                "the checkpoint is of another kind of device: its dropout is not continued, but seeded"
            )
        return
    platform.set_rng_state({"device": own["cuda_rng_state"]})
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracked = tracker.get_states()
    for name, state in own["rng_tracker_states"].items():
        if isinstance(tracked.get(name), torch.Generator):
            tracked[name].set_state(state)  # CUDA graphs refer to this generator object
        else:
            tracked[name] = state
    tracker.set_states(tracked)


def common_part(
    iteration: int, run_state: dict[str, Any], run: RunConfig, scheduler: Scheduler | None
) -> dict[str, Any]:
    """The part that is the same on all ranks, without that of the optimizer."""
    counters = {name: run_state[name] for name in _COUNTERS if name in run_state}
    common = {
        "args": arguments_of(run, **counters, iteration=iteration),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": run_state.get("num_floating_point_operations_so_far", 0),
        "pangu_pro": {
            "run_state": plain(run_state),
            "tokenizer_sha256": run.tokenizer.tokenizer_sha256,
            "padded_vocab_size": run.model.padded_vocab_size,
        },
    }
    if scheduler is not None:
        common["opt_param_scheduler"] = scheduler.state_dict()
    return common


def run_state_of(common: dict[str, Any]) -> dict[str, Any]:
    """The run state of our checkpoints, or the counters in upstream's."""
    if "pangu_pro" in common:
        return dict(common["pangu_pro"]["run_state"])
    saved = common.get("args") or {}
    state = {name: saved.get(name, 0) for name in _COUNTERS}
    state["num_floating_point_operations_so_far"] = common.get("num_floating_point_operations_so_far", 0)
    return state


def require_same_function(saved: Saved | None, model: ModelConfig, path: Path) -> None:
    """Raise CheckpointError, naming every flag that differs, if ``model`` is not the checkpoint's.

    Compares everything that decides what the model computes, not only its sizes. A checkpoint without
    arguments is not checked.
    """
    if not saved or "num_layers" not in saved:
        if torch.distributed.get_rank() == 0:
            logger.warning("%s holds no arguments: whether it is of the same model is not known", path)
    elif differing := model_function.differences(saved, model):
        raise CheckpointError(f"{path} holds another model: " + "; ".join(differing))


def require_same_tokenizer(common: dict[str, Any], ours: str | None, path: Path) -> None:
    """Raise CheckpointError if the checkpoint was trained with another tokenizer than the sha256 ``ours``."""
    theirs = common.get("pangu_pro", {}).get("tokenizer_sha256")
    if theirs and ours and theirs != ours:
        raise CheckpointError(
            f"{path} was trained with another tokenizer (sha256 {theirs[:12]}..., not {ours[:12]}...): "
            "its embeddings belong to other pieces; give its --tokenizer-model, or --finetune"
        )

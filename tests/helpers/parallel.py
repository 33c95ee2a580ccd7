"""Set up and tear down a parallel layout: Megatron-Core's global state, all of it, both ways."""

import os
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Layout:
    """How many ways a model is split: tensor (tp), pipeline (pp, of vpp chunks each), data (dp)."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"{name}{size}" for name, size in vars(self).items() if size and size > 1]
        return "x".join(parts) or "single"


def initialize(layout: Layout, seed: int = 1234) -> None:
    """Split the joined processes as ``layout`` says and seed all generators.

    Raises ValueError if the process group has another size than the layout.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_ext import platform

    if torch.distributed.get_world_size() != layout.world_size:
        joined = torch.distributed.get_world_size()
        raise ValueError(f"layout {layout} needs {layout.world_size} processes, {joined} joined")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
    )
    platform.seed_all(seed)
    model_parallel_cuda_manual_seed(seed)


def join(rank: int, world_size: int, meeting_file: str, backend: str, timeout_s: float) -> None:
    """Join a process group whose ranks meet at a file; a world of one needs none."""
    import torch

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
    }
    alone = world_size == 1
    store = torch.distributed.HashStore() if alone else torch.distributed.FileStore(meeting_file, world_size)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def destroy() -> None:
    """Forget every process group and every global of Megatron-Core."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    rerun_state_machine.destroy_rerun_state_machine()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    parallel_state.destroy_global_memory_buffer()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

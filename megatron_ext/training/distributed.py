"""Initializes the process group and the parallel groups."""

from datetime import timedelta

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import Store

from megatron_ext import platform
from megatron_ext.arguments.defaults import running_batch
from megatron_ext.common.errors import LostProcess
from megatron_ext.config import RunConfig
from megatron_ext.config.parallel import ProcessConfig
from megatron_ext.platform import rendezvous


def rendezvous_store(process: ProcessConfig) -> Store:
    """Rendezvous of the job's processes; returns its key-value store.

    Raises LostProcess if they do not all arrive within --distributed-timeout-minutes.
    """
    try:
        return rendezvous.open_store(process.rank, process.world_size, _timeout(process))
    except RuntimeError as error:
        raise LostProcess(f"the processes of the job have not found each other: {error}") from error


def initialize(run: RunConfig, store: Store | None = None) -> None:
    """Initialize the process group, the parallel groups, the seeds and the microbatch calculator."""
    platform.keep_freed_memory()
    platform.init_process_group(
        run.process.distributed_backend,
        run.process.rank,
        run.process.world_size,
        run.process.local_rank or 0,
        _timeout(run.process),
        store,
    )
    parallel_state.initialize_model_parallel(
        run.parallel.tensor_model_parallel_size,
        run.parallel.pipeline_model_parallel_size,
        run.parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=run.parallel.context_parallel_size,
        distributed_timeout_minutes=run.process.distributed_timeout_minutes,
    )
    seed(run)
    count_microbatches(run)


def count_microbatches(run: RunConfig) -> None:
    """Tell Megatron-Core the batch, from which it works out the micro batches of each step.

    Raises PlatformError where the installed version (0.18 and later) ignores --rampup-batch-size.
    """
    num_microbatches_calculator.init_num_microbatches_calculator(
        run.process.rank,
        run.training.rampup_batch_size,
        run.training.global_batch_size,
        run.training.micro_batch_size,
        run.parallel.data_parallel_size,
        run.training.decrease_batch_size_if_needed,
    )
    if num_microbatches_calculator.get_current_running_global_batch_size() != running_batch(run, 0):
        raise platform.PlatformError("this megatron-core ignores --rampup-batch-size (docs/engine.md)")


def _timeout(process: ProcessConfig) -> timedelta:
    return timedelta(minutes=process.distributed_timeout_minutes)


def shorten_timeout(process: ProcessConfig) -> None:
    """Reduce the timeout of collectives to --distributed-timeout-seconds-after-init; a collective call."""
    if process.distributed_timeout_seconds_after_init:
        parallel_state.update_pg_timeout(timedelta(seconds=process.distributed_timeout_seconds_after_init))


def seed(run: RunConfig) -> None:
    """Seed every generator as Megatron-LM does: by pipeline stage and, in its tracker, by tensor rank.

    Dropout uses these generators; the initial weights do not (models/initialization.py).
    """
    value = run.init.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    if run.init.data_parallel_random_init:
        value += 10 * parallel_state.get_data_parallel_rank()
    platform.seed_all(value)
    # CUDA graphs need generators whose state advances from replay to replay; Transformer Engine's layers then
    # require its own tracker (upstream's validate_args).
    graphs = run.graphs.cuda_graph_impl != "none"
    engine = graphs and run.layers.transformer_impl == "transformer_engine"
    model_parallel_cuda_manual_seed(value, te_rng_tracker=engine, use_cudagraphable_rng=graphs)


def finalize() -> None:
    """Destroy the process group, so that no rank waits for a socket."""
    num_microbatches_calculator.unset_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""Traces a training step of one rank of any layout with fake tensors: its FLOPs and memory.

config/describe.py and config/footprint.py calculate what a run needs from its shape; here the program itself
is measured. The training code builds the model and runs forward, backward and optimizer as on GPUs with the
local layers, without allocating memory and in seconds (traced_step.py, platform/fake.py).
"""

import contextlib
import io
import math
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from megatron_ext.config import RunConfig, describe


@dataclass(frozen=True)
class Trace:
    """The measurements of a step of one rank.

    Attributes:
        rank, stage: the process's number in the job, and its pipeline stage.
        groups: "tensor", "pipeline", "data" -> the ranks that share the dimension with this one.
        shapes: name -> shape of each parameter of the rank; names are prefixed with the chunk's number.
        flops: floating point operations of the step; attention is counted as causal.
        memory: "weights", "gradients", "optimizer", "activations" -> bytes. Activations are the
            peak of the forward and backward passes in excess of the others.
        update: peak bytes of the optimizer's step in excess of the first three.
        micro_batches: how many micro batches of the step were run: enough to fill the pipeline.
    """

    rank: int
    stage: int
    groups: dict[str, list[int]]
    shapes: dict[str, tuple[int, ...]]
    flops: int
    memory: dict[str, int]
    update: int
    micro_batches: int

    @property
    def parameters(self) -> int:
        """Number of parameters on the rank."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def trace(run: RunConfig, rank: int = 0, triton: bool = True) -> Trace:
    """Trace a step of one rank, in a separate process.

    Args:
        run: a configuration for GPUs, with the local layers.
        triton: whether Triton is installed on the machines of the run.

    Raises:
        ValueError: the layers are Transformer Engine's, or the vocabulary size is unknown.
    """
    if run.layers.transformer_impl != "local":
        raise ValueError("only the local layers can be traced: --transformer-impl local")
    parallel, micro_batches = run.parallel, run.training.global_batch_size // run.samples_at_once
    # Enough to fill the pipeline; the interleaved schedule runs further ahead, in multiples of the stages.
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    traced = min(micro_batches, parallel.pipeline_model_parallel_size * min(chunks, 2))
    short = run.but(
        rank=rank,
        padded_vocab_size=describe.vocabulary_of(run),
        global_batch_size=traced * run.samples_at_once,
        rampup_batch_size=None,
    )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        seen = process.submit(_trace, short, triton).result()
    seen["flops"] = seen["flops"] * micro_batches // traced
    return Trace(rank=rank, micro_batches=traced, **seen)


def _trace(run: RunConfig, triton: bool) -> dict[str, Any]:
    """Run the traced step; the output of the trainer and its packages is discarded."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from megatron_ext import platform

        platform.activate("cpu")  # before Megatron-Core is imported
        from megatron_ext.training import traced_step

        return traced_step.run_rank(run, triton)

"""A training step of one rank of any layout, run over fake tensors: what it computes and what it keeps.

Arithmetic (config/describe.py, config/footprint.py) says what a run needs from its shape; here the program
itself says it. The model is built and goes forward, backward and through the optimizer by the code that
trains, as on GPUs with the local layers, without memory and in seconds (traced_step.py, platform/fake.py).
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
    """What a step of one rank was seen to do.

    Attributes:
        rank, stage: the process's number in the job, and its pipeline stage.
        groups: "tensor", "pipeline", "data" -> the ranks that share the dimension with this one.
        shapes: name -> shape of each parameter of the rank; in front of the name its chunk's number.
        flops: operations of the step, those of attention counted as causal.
        memory: "weights", "gradients", "optimizer", "activations" -> bytes. Activations are all that the
            forward and backward passes need beside the others, where they need most.
        update: bytes that the optimizer's step needs beside the first three, where it needs most.
        micro_batches: how many of the step's were run: as many as fill the pipeline.
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
        """Parameters that the rank holds."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def trace(run: RunConfig, rank: int = 0, triton: bool = True) -> Trace:
    """Trace a step of one rank, in a process of its own.

    Args:
        run: as it was read for GPUs, with the local layers.
        triton: whether Triton is installed where it will be run.

    Raises:
        ValueError: the layers are Transformer Engine's, or nothing says how large the vocabulary is.
    """
    if run.layers.transformer_impl != "local":
        raise ValueError("only the local layers can be traced: --transformer-impl local")
    parallel, micro_batches = run.parallel, run.training.global_batch_size // run.samples_at_once
    # As many as fill the pipeline; the interleaved schedule runs further ahead, in multiples of the stages.
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    taken = min(micro_batches, parallel.pipeline_model_parallel_size * min(chunks, 2))
    short = run.but(
        rank=rank,
        padded_vocab_size=describe.vocabulary_of(run),
        global_batch_size=taken * run.samples_at_once,
        rampup_batch_size=None,
    )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        seen = process.submit(_trace, short, triton).result()
    seen["flops"] = seen["flops"] * micro_batches // taken
    return Trace(rank=rank, micro_batches=taken, **seen)


def _trace(run: RunConfig, triton: bool) -> dict[str, Any]:
    """What the trainer and its packages print there is not about the job, and is not shown."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from megatron_ext import platform

        platform.activate("cpu")  # before Megatron-Core is imported
        from megatron_ext.training import traced_step

        return traced_step.run_rank(run, triton)

"""The configuration of a model that is only used: what its checkpoint says, for this job and machine."""

from pathlib import Path
from typing import Any

from megatron_ext.arguments import defaults, validate
from megatron_ext.arguments.parser import with_defaults
from megatron_ext.checkpoint import saved_args
from megatron_ext.config import RunConfig, model_function
from megatron_ext.config.model_function import Saved


def arguments_of(
    saved: Saved,
    load: str | Path,
    iteration: int | None = None,
    layout: tuple[int, int] | None = None,
    **given: Any,
) -> RunConfig:
    """The trainer's defaults with a checkpoint's model and tokenizer, for this job and machine.

    ``layout`` is (tensor, pipeline) parallel sizes; by default all processes are used for tensor parallelism.
    ``given`` are further values, by name, which count more than the checkpoint's.

    Raises ValueError, naming the missing or wrong arguments, if ``saved`` does not describe a model, or it
    cannot be divided so.
    """
    values = with_defaults({}, [])
    values |= model_function.taken(saved, set(), (*saved_args.MODEL, *saved_args.TOKENIZER))
    run = RunConfig.of(values | given)
    defaults.from_environment(run.process, None)
    problems = defaults.device(run, None)
    tensor, pipeline = layout or (run.process.world_size, 1)
    run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size = tensor, pipeline
    run.training.micro_batch_size = given.get("micro_batch_size", 1)
    run.checkpoint.load, run.checkpoint.ckpt_step = str(load), iteration
    defaults.before_rules(run)
    problems += validate.problems_of_model(run) or validate.problems_of_layout(run)
    if problems:
        raise ValueError("; ".join(problems))
    defaults.after_rules(run)
    return run

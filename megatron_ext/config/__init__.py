"""The configuration by concern; each field is a flag too (``flags.py`` makes it).

``sections()`` are those of the command line, in the order of ``--help``.
"""

from functools import cache

from megatron_ext.config import data, model, output, parallel, training
from megatron_ext.config.flags import Option, argparse_form, core_options, own_options

TRANSFORMER = ("transformer.transformer_config", "TransformerConfig")
MODEL_PARALLEL = ("model_parallel_config", "ModelParallelConfig")


@cache
def sections() -> dict[str, list[Option]]:
    """Title -> options of every flag of the program."""
    return {
        "PanGu-pi": own_options(model.PanguArguments),
        "model": core_options(*TRANSFORMER, model.TRANSFORMER_FIELDS) + own_options(model.ModelArguments),
        "batch, duration and exit": own_options(training.TrainingArguments),
        "optimizer": own_options(training.OptimizerArguments),
        "learning rate": own_options(training.ScheduleArguments),
        "data": own_options(data.DataArguments),
        "tokenizer": own_options(data.TokenizerArguments),
        "validation": own_options(data.ValidationArguments),
        "checkpoints": own_options(output.CheckpointArguments),
        "logging": own_options(output.LoggingArguments),
        "model parallelism": core_options(*MODEL_PARALLEL, parallel.MODEL_PARALLEL_FIELDS),
        "pipeline": own_options(parallel.PipelineArguments)
        + core_options(*TRANSFORMER, parallel.PIPELINE_SPLIT_FIELDS),
        "data parallelism": own_options(parallel.DataParallelArguments),
        "recomputation": own_options(parallel.RecomputeArguments)
        + core_options(*TRANSFORMER, parallel.RECOMPUTE_FIELDS),
        "precision": own_options(training.PrecisionArguments)
        + core_options(*TRANSFORMER, training.FP8_FIELDS)
        + own_options(training.Fp8Arguments),
        "CUDA graphs": core_options(*TRANSFORMER, parallel.GRAPH_FIELDS),
        "fused kernels to switch off": own_options(model.FusionArguments),
        "random numbers": own_options(training.RandomArguments),
        "processes": own_options(parallel.ProcessArguments),
        "profiling": own_options(output.ProfilingArguments),
    }


@cache
def options() -> dict[str, Option]:
    """Destination -> option."""
    return {option.name: option for group in sections().values() for option in group}


def flag_of(name: str) -> str:
    """The first spelling of a destination's flag."""
    return argparse_form(options()[name])[0][0] if name in options() else name

"""Rules of the model and its number formats."""

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig


def positions_fit(run: RunConfig, typed: Typed) -> Problems:
    if run.model.max_position_embeddings < run.data.seq_length:
        yield (
            f"--max-position-embeddings {run.model.max_position_embeddings} must be at least "
            f"--seq-length {run.data.seq_length}"
        )


def model_is_one(run: RunConfig, typed: Typed) -> Problems:
    yield from run.model.problems()


def one_precision(run: RunConfig, typed: Typed) -> Problems:
    if run.precision.bf16 and run.precision.fp16:
        yield "--bf16 and --fp16 exclude each other"


def half_precision_needs_a_gpu(run: RunConfig, typed: Typed) -> Problems:
    if run.precision.fp16 and run.process.device == "cpu":
        yield "--fp16 needs a GPU; on a CPU use fp32 (the default) or --bf16"


def reduction_formats_agree(run: RunConfig, typed: Typed) -> Problems:
    if run.parallel.grad_reduce_in_bf16 and typed.get("accumulate_allreduce_grads_in_fp32"):
        yield "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other"


RULES_OF_SHAPE = (positions_fit, model_is_one)
RULES = (*RULES_OF_SHAPE, one_precision, half_precision_needs_a_gpu, reduction_formats_agree)

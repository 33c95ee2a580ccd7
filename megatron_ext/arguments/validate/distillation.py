"""Rules of learning from a teacher."""

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig


def student_can_be_taught(run: RunConfig, typed: Typed) -> Problems:
    """All that does not go with a teacher, whatever it is."""
    if run.distillation.teacher_load is None:
        return
    if run.validation.skip_train:
        yield "--teacher-load teaches while training: leave out --skip-train"
    if run.parallel.virtual_pipeline_model_parallel_size:
        yield "--teacher-load does not go with --num-layers-per-virtual-pipeline-stage (interleaving)"
    if run.parallel.context_parallel_size > 1:
        yield "--teacher-load does not go with --context-parallel-size above 1; use another layout"
    if run.layers.cross_entropy_loss_fusion:
        yield "--cross-entropy-loss-fusion computes no divergence from a teacher: leave it out"


RULES = (student_can_be_taught,)

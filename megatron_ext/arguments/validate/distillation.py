"""Rules of learning from a teacher."""

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig


def student_can_be_taught(run: RunConfig, typed: Typed) -> Problems:
    """All that does not go with a teacher, whatever it is."""
    flags = run.distillation
    flag = "--teacher-load" if flags.teacher_load else "--teacher-logits"
    if flags.teacher_load is None and flags.teacher_logits is None:
        return
    if run.validation.skip_train:
        yield f"{flag} teaches while training: leave out --skip-train"
    if run.parallel.context_parallel_size > 1:
        yield f"{flag} does not go with --context-parallel-size above 1; use another layout"
    if run.layers.cross_entropy_loss_fusion:
        yield "--cross-entropy-loss-fusion computes no divergence from a teacher: leave it out"


def teacher_predicts_or_has_predicted(run: RunConfig, typed: Typed) -> Problems:
    flags = run.distillation
    if flags.teacher_load is not None and flags.teacher_logits is not None:
        yield "--teacher-load predicts during the training, --teacher-logits has predicted before: give one"
    if flags.teacher_load is not None and run.parallel.virtual_pipeline_model_parallel_size:
        yield "--teacher-load does not go with --num-layers-per-virtual-pipeline-stage (interleaving)"


def targets_can_be_recorded(run: RunConfig, typed: Typed) -> Problems:
    flags = run.distillation
    if flags.record_teacher_logits is None:
        return
    if not flags.distillation_top_k:
        yield "--record-teacher-logits needs --distillation-top-k, such as 32"
    if run.rounds.round_index:
        yield "--record-teacher-logits records the whole training set: leave out --round-index"
    if run.rounds.record_sample_loss:
        yield "--record-teacher-logits and --record-sample-loss are two runs: give one"


RULES = (student_can_be_taught, teacher_predicts_or_has_predicted, targets_can_be_recorded)

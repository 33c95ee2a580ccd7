"""Distillation: the student also learns from the distributions that a teacher predicts."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import flag
from megatron_ext.config.needs import RECORDING_TEACHER, TEACHER, TEACHER_MODEL


@dataclass(kw_only=True)
class DistillationConfig:
    """Learning from a teacher as well as from the text (docs/distillation.md)."""

    teacher_load: str | None = flag(None, metavar="FOLDER")
    """Teacher: a checkpoint of this program or of Megatron-LM, of any layout, or a Hugging Face folder. It
    may be of another size than the student, and predicts while that is trained."""

    teacher_tokenizer_model: str | None = flag(None, metavar="PATH", needs=[TEACHER_MODEL])
    """The teacher's tokenizer (a file or folder), if its checkpoint does not name it or it moved."""

    teacher_logits: str | None = flag(None, metavar="PATH")
    """Learn from the targets that --record-teacher-logits wrote to PATH, in place of a teacher that predicts
    during the training."""

    record_teacher_logits: str | None = flag(None, metavar="PATH", needs=[TEACHER_MODEL])
    """Write the teacher's --distillation-top-k largest probabilities for each token of the training set to
    PATH (.npy) with a manifest, without training."""

    teacher_logits_dtype: Literal["fp16", "fp32"] = flag("fp16", needs=[RECORDING_TEACHER])
    """Number format of the log-probabilities that are written; fp16 changes the loss by less than 0.001."""

    distillation_alpha: float = flag(0.5, minimum=0, maximum=1, needs=[TEACHER])
    """Share A of the teacher in the loss: (1 - A) cross entropy + A T^2 KL(teacher || student). With 0 the
    run is the one without a teacher, bit for bit."""

    distillation_alpha_decay_style: Literal["constant", "linear"] = flag("constant", needs=[TEACHER])
    """How --distillation-alpha changes over the run; linear falls to 0 at its end."""

    distillation_temperature: float = flag(1.0, above=0, needs=[TEACHER])
    """Temperature T, by which the logits of teacher and student are divided in the divergence."""

    distillation_top_k: int = flag(0, minimum=0, needs=[TEACHER])
    """Learn the teacher's K largest probabilities and the sum of the others; 0 learns all of them, or as many
    as --teacher-logits holds."""

    @property
    def is_taught(self) -> bool:
        """Whether a teacher predicts in this run."""
        return self.teacher_load is not None and self.distillation_alpha > 0

    def alpha(self, done: float) -> float:
        """The teacher's share in the loss when the fraction ``done`` of the training is over."""
        if self.distillation_alpha_decay_style == "constant":
            return self.distillation_alpha
        return self.distillation_alpha * max(0.0, 1.0 - done)

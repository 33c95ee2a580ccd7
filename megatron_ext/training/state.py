"""The progress of a run, and the results of its steps and validations."""

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.common.errors import RunError


@dataclass
class Progress:
    """The progress of a run; stored in checkpoints.

    ``round_sha256`` identifies the index of the current round, None in the first; ``round_start`` is the
    number of samples consumed before this round, this stage, or the current training set; ``training_set``
    describes that set (data/identity.py), with the number of samples that it was shuffled for.
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_train_samples: int = 0
    #: A stop cut the validation of this iteration short: it is repeated first when the run resumes.
    validation_due: bool = False
    #: Iterations without an update because of NaN or Inf.
    bad_iterations: int = 0
    #: Tokens of the consumed samples, whose lengths may differ.
    consumed_train_tokens: int = 0
    round_sha256: str | None = None
    round_start: int = 0
    training_set: dict[str, Any] | None = None
    #: The stages of --data-stages (``Stage.described``) and the index of the current one.
    stages: list[dict[str, Any]] | None = None
    stage: int = 0
    #: Iterations of the checkpoints in --save that this run wrote or resumed from, ascending; without those
    #: that are later than the point it was set back to.
    checkpoints: list[int] = field(default_factory=list)


@dataclass
class StepResult:
    """The result of one step. ``lm_loss`` is the mean over the global batch's tokens, in nats.

    ``skipped``: no parameter was updated; ``bad``: because of a NaN or Inf.
    """

    lm_loss: float
    grad_norm: float
    skipped: bool
    bad: bool = False
    seconds: float = 0.0
    #: Further metrics by name, for the console, the metrics file and the boards.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """``lm_loss`` in nats per token, averaged over ``tokens``; ``bits_per_byte`` of text.

    Bits per byte are comparable between tokenizers. Special tokens represent no text: their loss counts in
    ``lm_loss`` only, as in nanochat's evaluate_bpb. Both are NaN on ranks without the loss, and if no token
    counts.
    """

    lm_loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class TaskScore:
    """A mean over the items of a task, and its bootstrap error."""

    value: float
    error: float


@dataclass
class Finding:
    """The problems of one rank in a step; ``microbatches`` are those whose loss is not finite."""

    data_rank: int
    problems: list[str] = field(default_factory=list)
    microbatches: list[int] = field(default_factory=list)


class BadNumbers(RunError):
    """A loss or a gradient is NaN or Inf; ``findings`` has one entry per rank."""

    def __init__(self, message: str, findings: list[Finding]):
        super().__init__(message)
        self.findings = findings

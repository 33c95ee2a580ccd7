"""How far a run is, and what its steps and validations gave."""

from dataclasses import dataclass, field
from typing import Any

from megatron_ext.common.errors import RunError


@dataclass
class Progress:
    """How far a run is; stored in checkpoints.

    ``round_sha256`` names the index of the round it is in, None in the first; ``round_start`` are the
    samples consumed before this round, or before the training set that it now reads; ``training_set`` is
    the description of that set (data/identity.py), with the number of samples that its order was drawn for.
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_train_samples: int = 0
    #: The validation of this iteration was cut short by a stop, and is made first when the run goes on.
    validation_due: bool = False
    #: Iterations without an update because of NaN or Inf.
    bad_iterations: int = 0
    round_sha256: str | None = None
    round_start: int = 0
    training_set: dict[str, Any] | None = None
    #: Iterations of the checkpoints in --save that this run made or goes on from, ascending: not of those
    #: that it went back behind.
    checkpoints: list[int] = field(default_factory=list)


@dataclass
class StepResult:
    """What one step did. ``lm_loss`` is the mean over the global batch's tokens, in nats.

    ``skipped``: no parameter was updated; ``bad``: because of a NaN or Inf.
    """

    lm_loss: float
    grad_norm: float
    skipped: bool
    bad: bool = False
    seconds: float = 0.0
    #: What else the log shows, by name: on the console, in the metrics file, on the boards.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """``lm_loss`` in nats per token, over so many ``tokens``; ``bits_per_byte`` of text.

    Bits per byte compare tokenizers. Special tokens stand for no text: their loss counts in ``lm_loss``
    only, as nanochat's evaluate_bpb does. Both are NaN on ranks that do not hold the loss, and where no
    token counts.
    """

    lm_loss: float
    bits_per_byte: float
    tokens: int


@dataclass
class Finding:
    """What one rank saw of a step; ``microbatches`` are those whose loss is not finite."""

    data_rank: int
    problems: list[str] = field(default_factory=list)
    microbatches: list[int] = field(default_factory=list)


class BadNumbers(RunError):
    """A loss or a gradient is NaN or Inf; ``findings`` holds what every rank saw."""

    def __init__(self, message: str, findings: list[Finding]):
        super().__init__(message)
        self.findings = findings

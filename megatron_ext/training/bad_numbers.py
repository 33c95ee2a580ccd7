"""NaN and Inf in losses and gradients: their origin, and how many iterations may be skipped."""

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import nn

from megatron_ext.config import RunConfig
from megatron_ext.data.loader import sample_numbers
from megatron_ext.data.trace_sample import trace_sample
from megatron_ext.data.views import Samples
from megatron_ext.models.builder import unwrap
from megatron_ext.platform.collective import max_over_ranks, print_rank_0
from megatron_ext.training.batch import LossCounter
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.side import LinesFile
from megatron_ext.training.state import BadNumbers, Finding, Progress

REPORT = "bad_samples.jsonl"
_MAX_NAMES = 5


class LocalGradients:
    """Megatron-Core's ``finalize_model_grads``, preceded by a check of this rank's own gradients.

    Afterwards a NaN of one rank has been reduced into the gradients of all ranks.
    """

    def __init__(self) -> None:
        self.bad: list[str] = []

    def __call__(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        self.bad = [] if gradients_are_finite(model) else bad_parameters(model)
        finalize_model_grads(model, *args, **kwargs)


def gradients_are_finite(model: list[nn.Module]) -> bool:
    """Whether all gradients of this rank are finite, in one pass over the gradient buffers."""
    buffers = (buffer for chunk in model for buffer in chunk.buffers)
    return all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)


def bad_parameters(model: list[nn.Module]) -> list[str]:
    """The parameters of this rank whose gradient is NaN or Inf, from the embedding to the output."""
    return [
        name
        for chunk in model
        for name, parameter in unwrap(chunk).named_parameters()
        if not torch.isfinite(parameter.main_grad).all()
    ]


def check_finite(model: list[nn.Module], counter: LossCounter) -> None:
    """Raise BadNumbers on all ranks if a loss or a gradient of any rank is NaN or Inf; collective."""
    finite = gradients_are_finite(model)
    if not max_over_ranks([float(not finite or bool(counter.bad))])[0]:
        return
    problems = [f"the loss of microbatch {number} is {kind}" for number, kind in counter.bad.items()]
    finalize = model[0].config.finalize_model_grads_func
    names = finalize.bad if isinstance(finalize, LocalGradients) else bad_parameters(model)
    if names:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        problems.append(f"NaN or Inf in the gradient of {', '.join(names[:_MAX_NAMES])}{more}")
    own = Finding(parallel_state.get_data_parallel_rank(), problems, list(counter.bad))
    findings: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(findings, own)
    messages = [f"rank {rank}: {'; '.join(f.problems)}" for rank, f in enumerate(findings) if f.problems]
    raise BadNumbers("; ".join(messages) or "the sum of the ranks' finite gradients overflows", findings)


class BadNumberPolicy(Callback):
    """Skips up to ``--skip-bad-iterations`` iterations of a run; the next one ends it.

    The samples of each are written to ``bad_samples.jsonl`` in the --save folder, a JSON object per
    iteration.
    """

    def __init__(self, run: RunConfig, dataset: Samples) -> None:
        self.run, self.dataset = run, dataset
        self.report: LinesFile | None = None
        if run.checkpoint.save and torch.distributed.get_rank() == 0:
            self.report = LinesFile(Path(run.checkpoint.save) / REPORT, "report of bad samples")

    def bad_numbers(self, state: State, error: BadNumbers) -> bool:
        """Skip the iteration, up to the limit."""
        self.dataset = state.datasets[0] or self.dataset  # another one in each stage of --data-stages
        self.pass_over(error, state.progress, get_num_microbatches())
        return True

    def pass_over(self, error: BadNumbers, progress: Progress, microbatches: int) -> None:
        """Report the iteration after ``progress`` and count it; raises BadNumbers above the limit.

        Called on all ranks, with the ``error`` that was raised on all of them.
        """
        iteration, limit = progress.iteration + 1, self.run.training.skip_bad_iterations
        consumed = progress.consumed_train_samples - progress.round_start
        samples = self.samples(error.findings, consumed, microbatches)
        if self.report is not None:
            record = {"iteration": iteration, "problems": str(error), "samples": samples}
            self.report.write(json.dumps(record))
        progress.bad_iterations += 1
        numbers = ", ".join(str(sample["number"]) for sample in samples[:8]) + ", ..." * (len(samples) > 8)
        text = f"iteration {iteration}: {error}; samples {numbers}"
        if progress.bad_iterations > limit:
            raise BadNumbers(
                f"{text}; --iterations-to-skip {iteration} leaves this one out, "
                f"--skip-bad-iterations {progress.bad_iterations} as many as that",
                error.findings,
            )
        print_rank_0(
            f"WARNING: {progress.bad_iterations} of at most {limit} bad iterations, no update: {text}"
        )

    def samples(self, findings: list[Finding], consumed: int, microbatches: int) -> list[dict[str, Any]]:
        """The samples of the microbatches with a bad loss; if there is none, all of the global batch."""
        wanted = {(f.data_rank, number) for f in findings for number in f.microbatches}
        if not wanted:
            affected = [f for f in findings if f.problems] or findings
            wanted = {(f.data_rank, number) for f in affected for number in range(microbatches)}
        traced = []
        for rank in sorted({rank for rank, _ in wanted}):
            numbers = sample_numbers(self.dataset, self.run, consumed, microbatches, rank)
            for number, batch in enumerate(numbers):
                if (rank, number) in wanted:
                    place = {"data_parallel_rank": rank, "microbatch": number}
                    traced += [trace_sample(self.dataset, sample) | place for sample in batch]
        return traced

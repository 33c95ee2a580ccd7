"""Reports a run: Megatron's log line, JSON Lines, TensorBoard, and a progress bar on a terminal."""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.timers import Timers
from tqdm import tqdm

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.platform.collective import is_last_rank
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.metric_writers import MetricWriters
from megatron_ext.training.metrics import params_norm, peak_flops
from megatron_ext.training.side import LinesFile
from megatron_ext.training.spikes import SpikeDetector
from megatron_ext.training.state import Evaluation, StepResult, TaskScore

#: exp of a larger loss overflows a float.
MAX_EXPONENT = 709.0
T = TypeVar("T")


@dataclass
class IterationReport:
    """One finished iteration."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    global_batch_size: int
    lm_loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    seconds: float
    skipped: bool
    bad: bool = False
    #: Further metrics by their name in the metrics file.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Window:
    """The iterations since the last log line."""

    reports: list[IterationReport] = field(default_factory=list)

    def mean(self, name: str) -> float | None:
        """The mean over the iterations that were not skipped; None if there are none."""
        values = [getattr(report, name) for report in self.reports if not report.skipped]
        return sum(values) / len(values) if values else None


class Reporter(Callback):
    """Reports from the last rank, which holds the loss; silent on the others.

    ``--metrics-file`` receives one JSON object per iteration in full precision. The file is appended to, so
    that a resumed run continues it.
    """

    def __init__(self, run: RunConfig, first_iteration: int):
        self.run = run
        self.active = is_last_rank()
        self.window = _Window()
        self.skipped = self.bad = 0
        self.spikes = SpikeDetector()
        self.metrics: LinesFile | None = None
        self.boards: MetricWriters | None = None
        self.bar: tqdm[Any] | None = None
        if not self.active:
            return
        self.peak_flops = peak_flops(run.precision.params_dtype)
        if run.logging.metrics_file:
            self.metrics = LinesFile(run.logging.metrics_file, "--metrics-file").open()
        self.boards = MetricWriters(run.logging, run.flat())
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=run.training.train_iters, initial=first_iteration, unit="it", dynamic_ncols=True
            )

    def after_step(self, state: State, result: StepResult) -> None:
        """Report an iteration; a collective call if the parameter norm or timers are enabled."""
        run, progress = self.run, state.progress
        due = progress.iteration % run.logging.log_interval == 0
        if run.logging.log_params_norm and due:
            result.metrics["params_norm"] = params_norm(state.model)
        self.iteration(
            IterationReport(
                iteration=progress.iteration,
                consumed_samples=progress.consumed_train_samples,
                consumed_tokens=progress.consumed_train_tokens,
                global_batch_size=get_current_running_global_batch_size(),
                lm_loss=result.lm_loss,
                grad_norm=result.grad_norm,
                learning_rate=get_canonical_lr_for_logging(state.optimizer.param_groups) or 0.0,
                loss_scale=state.optimizer.get_loss_scale().item(),
                seconds=result.seconds,
                skipped=result.skipped,
                bad=result.bad,
                metrics=result.metrics,
            )
        )
        if run.logging.timing_log_level and due:
            self.times(state.model[0].config.timers, progress.iteration)

    def after_validation(self, state: State, result: Evaluation, split: str) -> None:
        progress = state.progress
        self.evaluation(result, progress.iteration, progress.consumed_train_samples, split)

    def after_scoring(self, state: State, scores: dict[str, dict[str, TaskScore]]) -> None:
        if not self.active:
            return
        progress = state.progress
        text = f" tasks at iteration {progress.iteration} |"
        record: dict[str, Any] = {"iteration": progress.iteration, "split": "tasks"}
        for task, numbers in scores.items():
            for metric, score in numbers.items():
                text += f" {task} {_words(metric)}: {score.value:.4f} |"
                record |= {f"{task}/{metric}": score.value, f"{task}/{metric}_error": score.error}
                if self.boards:
                    self.boards.scalar(
                        f"{task} {metric}", score.value, progress.iteration, progress.consumed_train_samples
                    )
        self.say(text)
        self._write(record)

    def stage_ends(self, state: State) -> None:
        self.flush()  # of tokens of one length

    def after_iteration(self, state: State, last: bool) -> None:
        if last:
            self.flush()

    def iteration(self, report: IterationReport) -> None:
        """Record one iteration; prints a line every ``--log-interval``."""
        if not self.active:
            return
        self.skipped += report.skipped
        self.bad += report.bad
        self.window.reports.append(report)
        speed = self._speed(report)
        usual = self.spikes.check(report.lm_loss)
        limit = self.run.training.grad_norm_skip_threshold
        if report.skipped and limit is not None and report.grad_norm > limit:
            self.say(f" WARNING: iteration {report.iteration} skipped, gradient norm {report.grad_norm:.4g}")
        self._write(self._of_stage(_iteration_record(report)) | speed | ({"spike": True} if usual else {}))
        if usual:
            self.say(f" WARNING: loss spike at iteration {report.iteration}: {report.lm_loss:.4f}, {usual}")
        if self.boards is not None and report.iteration % self.run.logging.tensorboard_log_interval == 0:
            self._to_boards(self.boards, report, speed)
        if self.bar:
            self.bar.update(1)
            self.bar.set_postfix_str(f"loss {report.lm_loss:.4f}, {speed['tokens_per_second']:.0f} tokens/s")
        if (
            report.iteration % self.run.logging.log_interval == 0
            or report.iteration == self.run.training.train_iters
        ):
            self.flush()

    def flush(self) -> None:
        """Print the line of the iterations since the last line, if there are any."""
        if self.active and self.window.reports:
            self.say(self._line())
            self.window, self.skipped, self.bad = _Window(), 0, 0

    def evaluation(self, result: Evaluation, iteration: int, consumed_samples: int, split: str) -> None:
        """Report a validation or test loss."""
        if not self.active:
            return
        stage = f" of stage {self.run.data.stage}" if self.run.data.stage else ""
        where = f"iteration {iteration} on {split} set{stage}"
        if not result.tokens:
            self.say(f" WARNING: no token counts in the loss at {where}: there is no validation loss")
            return
        ppl = math.exp(min(result.lm_loss, MAX_EXPONENT))
        text = (
            f" validation loss at {where} | lm loss value: {result.lm_loss:.6E} | lm loss PPL: {ppl:.6E} | "
        )
        if math.isfinite(result.bits_per_byte):  # NullTokenizer's ids have no text
            text += f"bits per byte: {result.bits_per_byte:.4f} | "
        self.say("-" * len(text) + "\n" + text + "\n" + "-" * len(text))
        record = self._of_stage({"iteration": iteration, "split": split})
        self._write(record | {"lm_loss": result.lm_loss, "bits_per_byte": result.bits_per_byte})
        if self.boards:
            tag = "lm loss validation" if split == "validation" else f"lm loss {split}"
            self.boards.scalar(tag, result.lm_loss, iteration, consumed_samples)
            if math.isfinite(result.bits_per_byte):
                self.boards.scalar(f"{tag} bits per byte", result.bits_per_byte, iteration, consumed_samples)
            if self.run.logging.log_validation_ppl_to_tensorboard:
                self.boards.scalar(f"{tag} ppl", ppl, iteration, consumed_samples)

    def say(self, text: str) -> None:
        """Print without breaking the progress bar."""
        if self.active:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def times(self, timers: Timers, iteration: int) -> None:
        """Report Megatron-Core's timers of the schedule and the optimizer; a collective call."""
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, sorted(timers._timers))
        names = sorted(set().union(*everyones))  # pipeline stages have different timers
        if not names:
            return
        if self.run.logging.log_timers_to_tensorboard:
            largest = timers._get_global_min_max_time(names, False, False, 1.0)
            if self.boards is not None:
                for name, (_, seconds) in largest.items():
                    self.boards.scalar(f"{name}-time", seconds, iteration)
        text = timers.get_all_timers_string(names, normalizer=self.run.logging.log_interval)
        if text:
            self.say(text)

    def close(self) -> None:
        """Flush and close all outputs."""
        for sink in (self.metrics, self.boards, self.bar):
            if sink is not None:
                sink.close()

    def _speed(self, report: IterationReport) -> dict[str, float]:
        length = self.run.data.seq_length
        tokens = report.global_batch_size * length / report.seconds
        flops = tokens * self.run.model.flops_per_token(length) / self.run.process.world_size
        # A peak that was measured on a busy machine is too low; a faster step corrects it.
        self.peak_flops = max(self.peak_flops, flops)
        return {
            "tokens_per_second": tokens,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops,
            "elapsed_ms_per_iteration": report.seconds * 1000,
        }

    def _line(self) -> str:
        """Megatron-LM's line, field by field (training.py:training_log)."""
        last, window = self.window.reports[-1], self.window
        mean_report = IterationReport(**{**vars(last), "seconds": window.mean("seconds") or last.seconds})
        speed = self._speed(mean_report)
        line = f" [{datetime.now().strftime('%Y-%m-%d %H:%M:%S')}]"
        line += f" iteration {last.iteration:8d}/{self.run.training.train_iters:8d} |"
        line += f" consumed samples: {last.consumed_samples:12d} |"
        line += f" elapsed time per iteration (ms): {speed['elapsed_ms_per_iteration']:.1f} |"
        if self.run.logging.log_throughput:
            digits = 1 if speed["tflops_per_device"] >= 1 else 4  # a laptop would show 0.0
            line += f" throughput per GPU (TFLOP/s/GPU): {speed['tflops_per_device']:.{digits}f} |"
            line += f" tokens/s: {speed['tokens_per_second']:.0f} | MFU: {100 * speed['mfu']:.1f}% |"
        line += f" learning rate: {last.learning_rate:.6E} |"
        line += f" global batch size: {last.global_batch_size:5d} |"
        if (loss := window.mean("lm_loss")) is not None:
            line += f" lm loss: {loss:.6E} |"
        line += f" loss scale: {last.loss_scale:.1f} |"
        line += f" grad norm: {last.grad_norm:.3f} |"
        for name, value in last.metrics.items():
            line += f" {_words(name)}: {value if isinstance(value, int) else f'{value:.3f}'} |"
        line += f" number of skipped iterations: {self.skipped:3d} |"
        line += f" number of nan iterations: {self.bad:3d} |"
        return line

    def _to_boards(self, boards: MetricWriters, report: IterationReport, speed: dict[str, float]) -> None:
        run = self.run
        values: dict[str, float | None] = {
            "learning-rate": report.learning_rate,
            "batch-size": report.global_batch_size,
            "lm loss": report.lm_loss,
            "grad-norm": report.grad_norm,
            "iteration-time": report.seconds,
            "loss-scale": report.loss_scale if run.logging.log_loss_scale_to_tensorboard else None,
            "world-size": run.process.world_size if run.logging.log_world_size_to_tensorboard else None,
            "throughput": speed["tflops_per_device"] if run.logging.log_throughput else None,
            "mem-max-allocated-bytes": platform.max_memory_bytes()
            if run.logging.log_memory_to_tensorboard
            else None,
        } | {_words(name).replace(" ", "-"): value for name, value in report.metrics.items()}
        for tag, value in values.items():
            if (number := _number(value)) is not None:
                boards.scalar(tag, number, report.iteration, report.consumed_samples)

    def _of_stage(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with the stage of --data-stages, if there are any."""
        return record | ({"stage": self.run.data.stage} if self.run.data.stage else {})

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            finite = {name: _number(value) for name, value in record.items()}
            self.metrics.write(json.dumps(finite, allow_nan=False))


def _iteration_record(report: IterationReport) -> dict[str, Any]:
    record = {
        "iteration": report.iteration,
        "consumed_samples": report.consumed_samples,
        "consumed_tokens": report.consumed_tokens,
        "lm_loss": report.lm_loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "global_batch_size": report.global_batch_size,
        "loss_scale": report.loss_scale,
        "skipped": report.skipped,
        "time": time.time(),
    }
    return record | report.metrics


def _words(name: str) -> str:
    """A metric's name as shown on the console."""
    return name.removesuffix("_in_grad").replace("_", " ")


def _number(value: T) -> T | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What tools/evaluate.py is asked to do; each field is a flag."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import Need, flag, given_fields, without_effect, wrong_fields
from megatron_ext.evaluation.documents import BENCHMARKS
from megatron_ext.evaluation.forms import TASKS as FORMS_OF_BENCHMARKS
from megatron_ext.evaluation.requests import TOKENS_AT_ONCE

SCORES = Need("--tasks or --bits-per-byte", lambda options: options.tasks or options.bits_per_byte)
TASKS = Need("--tasks", lambda options: options.tasks)
BENCHMARK = Need(
    "one of our benchmarks in --tasks",
    lambda options: any(name in BENCHMARKS or name in FORMS_OF_BENCHMARKS for name in options.tasks or ()),
)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """An evaluation, or a comparison of two."""

    load: str | None = flag(None, needs=[SCORES], metavar="DIR", section="model")
    """A checkpoint of ours or Megatron-LM's, as given to --save, or a Hugging Face folder."""

    ckpt_step: int | None = flag(None, needs=[SCORES], minimum=0)
    """Iteration to load; by default the newest."""

    tokenizer_model: str | None = flag(None, needs=[SCORES], metavar="PATH")
    """The tokenizer's file or folder, if it moved or is not there."""

    tasks: list[str] | None = flag(None, section="what to score", metavar="NAME")
    """Benchmarks (cmmlu mmlu agieval piqa eprstmt c3), in the forms letters and cloze; single forms (c3_bpb);
    or tasks of lm-evaluation-harness by its names, whose data it downloads."""

    data_dir: str | None = flag(None, needs=[BENCHMARK], metavar="DIR")
    """The folder with the benchmarks' files, as docs/evaluation.md lays them out."""

    limit: int | None = flag(None, needs=[TASKS], minimum=1)
    """Score so many questions of each task, taken from all subjects in turn."""

    num_fewshot: int | None = flag(None, needs=[TASKS], minimum=0)
    """Examples in front of each question, of its own subject; without it the task's number, for ours 0."""

    bits_per_byte: list[str] | None = flag(None, metavar="FILE")
    """Measure the bits per byte of these texts, files or globs: JSON Lines or parquet with a "text", or .txt
    (also .gz, .zst, .xz, .bz2), each of which is one text."""

    compare: list[str] | None = flag(None, nargs=2, metavar=("A", "B"))
    """Compare two results, folders of --output, item by item; scores nothing."""

    output: str | None = flag(None, needs=[SCORES], section="output", metavar="DIR")
    """Write results.json, table.md, scores.png and every item's scores there, and keep what was scored:
    started again after a kill, it goes on. More tasks of the same model are added."""

    tensor_model_parallel_size: int = flag(1, needs=[SCORES], minimum=1, section="how")
    """Processes that share each layer."""

    pipeline_model_parallel_size: int = flag(1, needs=[SCORES], minimum=1)
    """Processes that hold some layers each; the processes that are left share the questions."""

    tokens_at_once: int = flag(TOKENS_AT_ONCE, needs=[SCORES], minimum=1)
    """Tokens of a forward pass of one process."""

    device: Literal["auto", "cpu", "cuda"] = flag("auto", needs=[SCORES])
    """Where to compute."""

    dtype: Literal["fp32", "checkpoint"] = flag("fp32", needs=[SCORES])
    """Number format to compute in: fp32, or that of the checkpoint, on a GPU."""

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        found = list(wrong_fields(self))
        scores = self.tasks or self.bits_per_byte
        if not self.compare and not scores:
            return [*found, "give --tasks, --bits-per-byte, or --compare"]
        if self.compare and scores:
            found.append("--compare reads results that are there: leave --tasks and --bits-per-byte out")
        if scores and self.load is None:
            found.append("--tasks and --bits-per-byte need --load")
        return [*found, *without_effect(given_fields(self), self)]

"""What tools/evaluate.py is asked to do; each field is a flag."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.common.flags import flag, wrong_fields
from megatron_ext.evaluation.requests import TOKENS_AT_ONCE


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """An evaluation, or a comparison of two."""

    load: str | None = flag(None, metavar="DIR", section="model")
    """A checkpoint of ours or Megatron-LM's, as given to --save, or a Hugging Face folder."""

    ckpt_step: int | None = flag(None, minimum=0)
    """Iteration to load; by default the newest."""

    tokenizer_model: str | None = flag(None, metavar="PATH")
    """The tokenizer's file or folder, if it moved or is not there."""

    tasks: list[str] | None = flag(None, section="what to score", metavar="NAME")
    """Benchmarks (cmmlu mmlu agieval piqa eprstmt c3), in the forms letters and cloze; single forms (c3_bpb);
    or tasks of lm-evaluation-harness by its names, whose data it downloads."""

    data_dir: str | None = flag(None, metavar="DIR")
    """The folder with the benchmarks' files, as docs/evaluation.md lays them out."""

    limit: int | None = flag(None, minimum=1)
    """Score so many questions of each task, taken from all subjects in turn."""

    num_fewshot: int | None = flag(None, minimum=0)
    """Examples in front of each question, of its own subject; without it the task's number, for ours 0."""

    bits_per_byte: list[str] | None = flag(None, metavar="FILE")
    """Measure the bits per byte of these texts: JSON Lines or parquet with a "text", or .txt."""

    compare: list[str] | None = flag(None, nargs=2, metavar=("A", "B"))
    """Compare two results, folders of --output, item by item; scores nothing."""

    output: str | None = flag(None, section="output", metavar="DIR")
    """Write results.json, table.md, scores.png and every item's scores there, and keep what was scored:
    started again after a kill, it goes on."""

    tensor_model_parallel_size: int = flag(1, minimum=1, section="how")
    """Processes that share each layer."""

    pipeline_model_parallel_size: int = flag(1, minimum=1)
    """Processes that hold some layers each; the processes that are left share the questions."""

    tokens_at_once: int = flag(TOKENS_AT_ONCE, minimum=1)
    """Tokens of a forward pass of one process."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    dtype: Literal["fp32", "checkpoint"] = "fp32"
    """Number format to compute in: fp32, or that of the checkpoint, on a GPU."""

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        found = list(wrong_fields(self))
        scores = [
            flag
            for flag, value in (("--tasks", self.tasks), ("--bits-per-byte", self.bits_per_byte))
            if value
        ]
        if self.compare and (scores or self.load):
            found.append(
                "--compare reads results that are there: leave --load, --tasks and --bits-per-byte out"
            )
        if not self.compare and not scores:
            found.append("give --tasks, --bits-per-byte, or --compare")
        if scores and self.load is None:
            found.append(f"{' and '.join(scores)} need --load")
        for name in ("limit", "num_fewshot"):
            if getattr(self, name) is not None and not self.tasks:
                found.append(f"--{name.replace('_', '-')} needs --tasks")
        return found

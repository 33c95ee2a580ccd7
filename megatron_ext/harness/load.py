"""A model to evaluate, from a checkpoint or a Hugging Face folder, at the layout that is asked for."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_ext import platform
from megatron_ext.checkpoint.found import find
from megatron_ext.common.files import pieces_digest, sha256
from megatron_ext.config import RunConfig
from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.harness.options import EvaluateOptions
from megatron_ext.inference import load_for_inference
from megatron_ext.interchange.as_checkpoint import as_checkpoint, is_hugging_face
from megatron_ext.interchange.source import Source
from megatron_ext.models.gpt_model import PanguModel
from megatron_ext.platform.collective import ranks
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.tokenizer.build import HUGGINGFACE_FILES, HuggingFaceTokenizer


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be asked.

    Attributes:
        start: ids that its tokenizer puts in front of every text, as transformers reads its folder.
        name: the folder and what is in it, for reports.
        settings: its weights and how they are computed with, which decide every score to the last bit.
    """

    model: PanguModel
    tokenizer: Tokenizer
    run: RunConfig
    start: tuple[int, ...]
    name: str
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        """Of all settings, for what is kept of an earlier run."""
        return sha256(json.dumps(self.settings))


def join() -> None:
    """Meet the other processes of the job, if there are any."""
    rank, size, local = (int(os.environ.get(name, number)) for name, number in _PROCESS.items())
    platform.init_process_group(None, rank, size, local, timedelta(minutes=10))


_PROCESS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@contextmanager
def opened(options: EvaluateOptions) -> Iterator[Opened]:
    """The model of ``--load`` on every rank of the job; a collective call.

    Joins the job's processes. A Hugging Face folder is written as a checkpoint first, which every layout
    loads, in the system's folder for temporary files (TMPDIR; with several machines it must be one that all
    of them see).

    Raises:
        EvaluationError: it has no tokenizer; --ckpt-step with a Hugging Face folder.
        ValueError, CheckpointError, FileNotFoundError: as :func:`load_for_inference`; also if the tokenizer
            is not the checkpoint's.
    """
    assert options.load is not None
    if is_hugging_face(options.load) and options.ckpt_step is not None:
        raise EvaluationError(f"--ckpt-step: --load {options.load} is a Hugging Face folder, of one model")
    join()
    with as_checkpoint(options.load, options.tokenizer_model, _require_tokenizer) as folder:
        start = _start(options) if is_hugging_face(options.load) else ()
        yield _of_checkpoint(options, folder, start)


def _of_checkpoint(options: EvaluateOptions, load: str, start: tuple[int, ...] = ()) -> Opened:
    layout = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    numbers = {"bf16": False, "fp16": False, "params_dtype": torch.float32}
    model, tokenizer, run = load_for_inference(
        load,
        options.ckpt_step,
        options.tokenizer_model,
        layout=layout,
        **(numbers if options.dtype == "fp32" or not platform.on_gpu() else {}),
    )
    if run.tokenizer.tokenizer_type == "NullTokenizer":
        raise EvaluationError(
            f"--load {options.load}: has no tokenizer, so its ids are numbers and no text can be scored; "
            "--tokenizer-model names the one that it was trained with"
        )
    folder = find(load, run.checkpoint.ckpt_step).tries[0][0]
    settings = {
        "weights": _content(folder),
        "tokenizer": tokenizer.sha256,
        "first ids of a text": list(start),
        "processes": ranks(),
        "--tensor-model-parallel-size": layout[0],
        "--pipeline-model-parallel-size": layout[1],
        "--tokens-at-once": options.tokens_at_once,
        "--dtype": str(run.precision.params_dtype).removeprefix("torch."),
        "--device": run.process.device,
    }
    return Opened(
        model,
        tokenizer,
        run,
        start,
        f"{options.load} (iteration {run.checkpoint.ckpt_step})"
        if load == options.load
        else str(options.load),
        settings,
    )


def _content(folder: Path) -> str:
    """A name of a checkpoint's weights, wherever it lies: they are the same files after each conversion."""
    weights = sorted(folder.glob("*.distcp")) + [folder / ".metadata"]
    return sha256(" ".join(pieces_digest(path) for path in weights if path.is_file()))


def _require_tokenizer(source: Source) -> None:
    if source.tokenizer is None:
        raise EvaluationError(
            f"--load {source.path}: has no tokenizer, so no text can be scored; --tokenizer-model names the "
            "one that it was trained with"
        )


def _start(options: EvaluateOptions) -> tuple[int, ...]:
    """What transformers puts in front of every text, such as <s> for Llama; nothing without its files."""
    from transformers.utils import logging

    folders = [Path(one) for one in (options.tokenizer_model, options.load) if one]
    folder = next((one for one in folders if any((one / name).is_file() for name in HUGGINGFACE_FILES)), None)
    if folder is None:
        return ()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of the model's configuration, which is not used here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tokenizer = HuggingFaceTokenizer(folder).tokenizer
    finally:
        logging.set_verbosity(verbosity)
    bare, dressed = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    for length in range(len(dressed) - len(bare) + 1):
        if dressed[length : length + len(bare)] == bare:
            return tuple(dressed[:length])
    return ()

"""Rules of data, tokenizer and checkpoints; those of the second list check this machine's files."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.arguments.validate.rule import Problems, Typed
from megatron_ext.config import RunConfig, flag_of
from megatron_ext.config.data import is_number
from megatron_ext.evaluation.documents import BENCHMARKS
from megatron_ext.platform.environment import not_deterministic

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SUPPORTED_TOKENIZERS = (*SENTENCEPIECE, "HuggingFaceTokenizer", "NullTokenizer")
#: The start of every record in a metrics file (training/reporting.py).
METRICS_START = b'{"iteration": '
SPLIT_PATHS = ("train_data_path", "valid_data_path", "test_data_path")


def data_comes_from_one_place(run: RunConfig, typed: Typed) -> Problems:
    given = [name for name in ("data_path", "data_args_path", "per_split_data_args_path") if run.get(name)]
    given += [name for name in ("mock_data", "data_stages") if run.get(name)]
    paths = SPLIT_PATHS[:1] if run.data.data_stages else SPLIT_PATHS  # validation may have its own
    given += ["train_data_path"] if any(run.get(name) for name in paths) else []
    if not given:
        yield "data is required: --data-path PREFIX, --train-data-path PREFIX, --data-stages or --mock-data"
    if len(given) > 1:
        yield f"{' and '.join(map(flag_of, given))} exclude each other: give the data once"


def split_is_three_shares(run: RunConfig, typed: Typed) -> Problems:
    if run.data.split is None:
        return
    try:
        shares = [float(share) for share in run.data.split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        yield f"--split {run.data.split!r}: give shares of training, validation and test, such as 949,50,1"


def loader_is_supported(run: RunConfig, typed: Typed) -> Problems:
    if run.data.dataloader_type == "external":
        yield "--dataloader-type external needs a loader of your own and is not supported here"


def tokenizer_is_named(run: RunConfig, typed: Typed) -> Problems:
    kind = run.tokenizer.tokenizer_type
    if kind is None:
        yield f"--tokenizer-type is required: {', '.join(SUPPORTED_TOKENIZERS)}"
    elif kind not in SUPPORTED_TOKENIZERS:
        yield f"--tokenizer-type {kind} is not supported here; use {', '.join(SUPPORTED_TOKENIZERS)}"
    elif kind == "NullTokenizer" and run.tokenizer.vocab_size is None:
        yield "--tokenizer-type NullTokenizer needs --vocab-size"
    elif kind != "NullTokenizer" and run.tokenizer.tokenizer_model is None:
        yield f"--tokenizer-type {kind} needs --tokenizer-model"


def saving_has_an_interval(run: RunConfig, typed: Typed) -> Problems:
    if run.checkpoint.save and run.checkpoint.save_interval is None:
        yield "--save needs --save-interval"
    if (
        run.checkpoint.save_interval
        and run.checkpoint.save_retain_interval
        and run.checkpoint.save_retain_interval % run.checkpoint.save_interval
    ):
        yield (
            f"--save-retain-interval {run.checkpoint.save_retain_interval} must be a multiple of "
            f"--save-interval {run.checkpoint.save_interval}"
        )


def format_is_supported(run: RunConfig, typed: Typed) -> Problems:
    if run.checkpoint.ckpt_format != "torch_dist":
        given = run.checkpoint.ckpt_format
        yield f"--ckpt-format {given} is not supported here; torch_dist loads into any layout"


def loading_is_of_one_kind(run: RunConfig, typed: Typed) -> Problems:
    if run.checkpoint.dist_ckpt_strictness != "assume_ok_unexpected":
        yield (
            f"--dist-ckpt-strictness {run.checkpoint.dist_ckpt_strictness} is not supported here: model and "
            "checkpoint are compared at every load, and a difference in their weights is an error"
        )


def tasks_can_be_scored(run: RunConfig, typed: Typed) -> Problems:
    tasks = run.validation.eval_tasks
    if not tasks:
        return
    if unknown := [name for name in tasks if name not in BENCHMARKS]:
        yield f"--eval-tasks {' '.join(unknown)}: unknown; there are {' '.join(BENCHMARKS)}"
    if run.validation.eval_tasks_data_dir is None:
        yield "--eval-tasks needs --eval-tasks-data-dir, the folder with the benchmarks' files"
    if run.tokenizer.tokenizer_type == "NullTokenizer":
        yield "--eval-tasks needs a tokenizer that knows text: NullTokenizer's ids are numbers"
    if run.parallel.context_parallel_size > 1:
        yield "--eval-tasks needs --context-parallel-size 1"
    if run.graphs.cuda_graph_impl != "none":
        yield "--eval-tasks excludes --cuda-graph-impl: a question has a length of its own"


RULES = (
    data_comes_from_one_place,
    split_is_three_shares,
    loader_is_supported,
    tokenizer_is_named,
    saving_has_an_interval,
    format_is_supported,
    loading_is_of_one_kind,
    tasks_can_be_scored,
)


def datasets_exist(run: RunConfig, typed: Typed) -> Problems:
    for name in ("data_path", *SPLIT_PATHS):
        yield from blend_problems(flag_of(name), run.get(name) or [])


def blend_problems(flag: str, words: list[str]) -> Iterator[str]:
    """The problems of 'prefix ...' or 'weight prefix weight prefix ...'."""
    weights = [is_number(word) for word in words[::2]]
    weighted = bool(words) and len(words) % 2 == 0 and any(weights)
    if weighted and not all(weights):
        yield f"{flag}: give a weight before every prefix, or before none"
        return
    if len(words) % 2 and len(words) > 1 and any(weights):
        yield f"{flag}: a weight without a prefix, or a prefix without a weight, in {' '.join(words)!r}"
        return
    for word in words[1::2] if weighted else words:
        yield from dataset_problems(flag, word.strip())


def dataset_problems(flag: str, prefix: str) -> Iterator[str]:
    """The problems of PREFIX.bin and PREFIX.idx."""
    missing = [suffix for suffix in (".bin", ".idx") if not os.path.exists(prefix + suffix)]
    if not missing:
        return
    hint = ""
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    for other in (stem, f"{stem}_text_document"):
        if other != prefix and os.path.exists(other + ".idx"):
            hint = f"; did you mean {other}?"
    yield f"{flag} {prefix}: there is no {' and no '.join(prefix + suffix for suffix in missing)}{hint}"


def named_files_exist(run: RunConfig, typed: Typed) -> Problems:
    for name in ("data_args_path", "per_split_data_args_path"):
        path = run.get(name)
        if path is not None and not os.access(path, os.R_OK):
            yield f"{flag_of(name)} {path}: there is no such file, or it cannot be read"
    if run.rounds.round_index is not None:
        yield from round_problems(run.rounds.round_index)
    if run.checkpoint.pretrained_checkpoint is not None and not os.path.isdir(
        run.checkpoint.pretrained_checkpoint
    ):
        yield f"--pretrained-checkpoint {run.checkpoint.pretrained_checkpoint}: there is no such folder"


def round_problems(path: str) -> Iterator[str]:
    """The problems of the files of ``--round-index``; their content is compared with the data later."""
    stem = path.removesuffix(".npy")
    for name in (f"{stem}.npy", f"{stem}.json"):
        if not os.access(name, os.R_OK):
            yield (
                f"--round-index {path}: there is no {name}, or it cannot be read; tools/build_round.py "
                "writes the index and beside it the manifest"
            )


def tokenizer_exists(run: RunConfig, typed: Typed) -> Problems:
    path = run.tokenizer.tokenizer_model
    if path is None or run.tokenizer.tokenizer_type not in SENTENCEPIECE:
        return
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        yield f"--tokenizer-model {path}: there is no such file, or it cannot be read"


def outputs_are_writable(run: RunConfig, typed: Typed) -> Problems:
    if run.process.rank != 0:
        return
    for name in ("save", "tensorboard_dir", "wandb_save_dir", "data_cache_path"):
        path = run.get(name)
        if path:
            yield from _unwritable(flag_of(name), Path(path))
    for name in ("metrics_file", "record_sample_loss"):
        path = run.get(name)
        if path and os.path.isdir(path):
            yield f"{flag_of(name)} {path}: is a folder, give a file"
        elif path:
            yield from _unwritable(flag_of(name), Path(path).parent)
    path = run.logging.metrics_file
    if path and os.path.isfile(path) and not _holds_metrics(path):
        yield f"--metrics-file {path}: holds something else than metrics; give another file"


def _holds_metrics(path: str) -> bool:
    """Whether a file starts like a metrics file; a killed run may have left an incomplete line."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(METRICS_START))
    except OSError:  # reported by the rule on writable paths
        return True
    return METRICS_START.startswith(start)


def _unwritable(flag: str, folder: Path) -> Iterator[str]:
    """Try to write to the folder, or to its nearest existing parent."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        link = "a link that leads nowhere" if there.is_symlink() else "a file, not a folder"
        yield f"{flag} {folder}: {there} is {link}"
        return
    try:
        # Permission bits do not show read-only mounts, and do not apply to root, so try it.
        tempfile.TemporaryFile(dir=there).close()  # leaves nothing behind, even if the process is killed
    except OSError as error:
        yield f"{flag} {folder}: cannot be written ({error.strerror} in {there})"


def environment_is_deterministic(run: RunConfig, typed: Typed) -> Problems:
    if run.layers.deterministic_mode and run.process.device == "cuda":
        yield from (f"--deterministic-mode: {problem}" for problem in not_deterministic())


def boards_are_installed(run: RunConfig, typed: Typed) -> Problems:
    for name, package in (("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")):
        if run.get(name) and importlib.util.find_spec(package) is None:
            yield f"{flag_of(name)} needs {package}: pip install {package}"


RULES_OF_THIS_MACHINE = (
    datasets_exist,
    named_files_exist,
    tokenizer_exists,
    outputs_are_writable,
    boards_are_installed,
    environment_is_deterministic,
)

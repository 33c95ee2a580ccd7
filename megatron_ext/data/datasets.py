"""The training, validation and test sets of a run, from Megatron-LM's data flags.

The samples are those of Megatron-LM's pretrain_gpt.py for the same flags: Megatron-Core's own
GPTDataset, blended by its own builder, with the configuration that core_gpt_dataset_config_from_args
creates. Around them, this module checks the files first, builds the index once and atomically, and raises
errors of one rank on all ranks.
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split, get_blend_from_list

from megatron_ext.config import RunConfig
from megatron_ext.config.data import DataConfig, is_number
from megatron_ext.data import index_cache
from megatron_ext.data.gpt import GPTDataset, MockGPTDataset
from megatron_ext.data.indexed import DatasetError, Index
from megatron_ext.data.manifest import TokenizerLike, check_dataset, sampled_ids
from megatron_ext.data.parts import check_parts
from megatron_ext.data.views import Samples
from megatron_ext.platform.collective import on_every_rank, on_first_rank

Blend = tuple[list[str], list[float] | None]
DEFAULT_SPLIT = "969, 30, 1"

logger = logging.getLogger(__name__)


def build_datasets(
    run: RunConfig, tokenizer: TokenizerLike, sizes: Sequence[int | None]
) -> tuple[Samples | None, ...]:
    """Build (train, valid, test), each None if the flags define no such set. A collective call.

    Args:
        run: data_path, split, {train,valid,test}_data_path, data_args_path,
            per_split_data_args_path, mock_data, data_cache_path, seed, seq_length and the other
            data flags.
        tokenizer: the result of build_tokenizer.
        sizes: number of samples of each set; None means one epoch, ignoring the weights of a blend.

    Returns:
        Megatron-Core datasets; a sample is a dict of tokens, labels (int64 [s]), loss_mask (float
        [s]), position_ids (int64 [s]) and, only with --reset-attention-mask, document_starts
        (int32 [s]).

    Raises:
        DatasetError: on every rank, if data is missing, damaged, of another tokenizer, too small,
            or the index cannot be stored.
    """
    config = on_every_rank(lambda: dataset_config(run, tokenizer), error=DatasetError)
    for split in Split:
        if sizes[split.value] == 0:
            _leave_out(config, split)
    if sizes[0] != 0 and not (config.blend_per_split or config.split_matrix)[0]:
        raise DatasetError(
            "no training data: the flags name none, or --split leaves none; or give --skip-train"
        )
    kind = MockGPTDataset if config.mock else GPTDataset

    def prepare() -> str | None:
        if config.mock:
            return None
        _check_data(config, sizes, tokenizer, run.data.split)
        return _fill_cache(kind, sizes, config)

    config.path_to_cache = on_first_rank(prepare, error=DatasetError)
    return tuple(on_every_rank(lambda: _build(kind, sizes, config), error=DatasetError))


def _leave_out(config: GPTDatasetConfig, split: Split) -> None:
    """Exclude a set from the configuration."""
    if config.blend_per_split:
        config.blend_per_split[split.value] = None
    else:
        config.split_matrix[split.value] = None


def dataset_config(run: RunConfig, tokenizer: TokenizerLike) -> GPTDatasetConfig:
    """The configuration as from Megatron-LM's core_gpt_dataset_config_from_args."""
    blend, blend_per_split = blends(run.data)
    if not run.data.mock_data and not blend and not any(blend_per_split or ()):
        # Megatron-Core would silently train on mock data.
        named = run.data.data_args_path or run.data.per_split_data_args_path
        raise DatasetError(f"{named}: names no data; give a prefix of at least one dataset")
    return GPTDatasetConfig(
        random_seed=run.init.seed,
        sequence_length=run.data.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=(run.data.split or DEFAULT_SPLIT) if blend else None,
        full_validation=run.validation.full_validation,
        num_dataset_builder_threads=run.data.num_dataset_builder_threads,
        path_to_cache=run.data.data_cache_path,
        mmap_bin_files=run.data.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=run.data.reset_position_ids,
        reset_attention_mask=run.data.reset_attention_mask,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,  # s * s bytes a sample; data/gpt.py says it with s numbers
    )


def blends(data: DataConfig) -> tuple[Blend | None, list[Blend | None] | None]:
    """(blend to be split, blends of each split) from the flags; at most one is not None.

    Raises:
        DatasetError: a file of arguments cannot be read or has another form.
    """
    if data.mock_data:
        return None, None
    words = data.data_path
    if data.data_args_path:
        words = _read_text(data.data_args_path).split()
    if words is not None:
        return _blend(words, "--data-args-path" if data.data_args_path else "--data-path"), None
    per_split = [data.train_data_path, data.valid_data_path, data.test_data_path]
    if data.per_split_data_args_path:
        per_split = _read_per_split(data.per_split_data_args_path)
    names = ("train", "valid", "test")
    return None, [_blend(w, f"--{n}-data-path") for w, n in zip(per_split, names, strict=True)]


def _blend(words: list[str] | None, flag: str) -> Blend | None:
    if not words:
        return None
    prefixes, weights = get_blend_from_list([str(word) for word in words])
    if weights is None and any(map(is_number, prefixes)):
        raise DatasetError(f"{flag}: give a weight before every prefix, or before none")
    if weights is not None and min(weights) <= 0:
        raise DatasetError(f"{flag}: weights must be above 0, got {min(weights):g}")
    return prefixes, weights


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from error


def _read_per_split(path: str) -> list[list[str] | None]:
    try:
        by_split = json.loads(_read_text(path))
        words = [by_split.get(name) for name in ("train", "valid", "test")]
        if not all(entry is None or isinstance(entry, str | list) for entry in words):
            raise ValueError("an entry is neither text nor a list")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f'--per-split-data-args-path {path}: must be JSON such as {{"train": ["1", "prefix"], '
            f'"valid": ["prefix"], "test": null}} ({error})'
        ) from error
    return [entry.split() if isinstance(entry, str) else entry for entry in words]


def _prefixes(config: GPTDatasetConfig) -> set[str]:
    blends = [config.blend] if config.blend else config.blend_per_split or []
    return {prefix for blend in blends if blend for prefix in blend[0]}


def _check_data(
    config: GPTDatasetConfig, sizes: Sequence[int | None], tokenizer: TokenizerLike, split: str | None
) -> None:
    """Check every dataset, and that each of its parts has text."""
    indices = {prefix: check_dataset(prefix, tokenizer) for prefix in sorted(_prefixes(config))}
    check_parts(config, indices, sizes, split)
    _warn_of_pad_tokens(indices, tokenizer)


def _warn_of_pad_tokens(indices: dict[str, Index], tokenizer: TokenizerLike) -> None:
    """Warn if the text contains the pad token, which upstream's samples neither predict nor read."""
    pad = tokenizer.pad
    if pad < 0 or pad in (tokenizer.eod, tokenizer.eos):
        return  # upstream then treats no token as the pad token
    for prefix, index in indices.items():
        if any((piece == pad).any() for piece in sampled_ids(prefix, index)):
            logger.warning(
                f"{prefix}: holds the tokenizer's pad token (id {pad}) as text; as in Megatron-LM it is not "
                "predicted, and id 0 is read in its place"
            )


class LocalBuilder(BlendedMegatronDatasetBuilder):
    """Megatron-Core's builder without its barriers: each rank builds independently.

    The callers synchronize the ranks, so that an error cannot leave the others waiting.
    """

    def __init__(self, kind: type[Any], sizes: Sequence[int | None], config: GPTDatasetConfig) -> None:
        super().__init__(kind, list(sizes), lambda: True, config)

    @staticmethod
    def build_generic_dataset(
        cls: type[Any], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *arguments: Any
    ) -> Any:
        """Construct ``cls(*arguments)``."""
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            # With a cache BlendedDataset needs the rank, which a single process does not have.
            arguments = (*arguments[:-1], copy.copy(arguments[-1]))
            arguments[-1].path_to_cache = None
        return cls(*arguments)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[float], sizes_per_dataset: list[list[int]]
    ) -> list[list[GPTDataset | None]]:
        """[split][prefix] datasets, with ``--num-dataset-builder-threads`` threads."""
        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as threads:
            by_prefix = threads.map(
                lambda prefix, sizes: self._build_megatron_dataset_splits(prefix, split, sizes),
                prefixes,
                sizes_per_dataset,
            )
            return [list(datasets) for datasets in zip(*by_prefix, strict=True)]


def _build(kind: type[Any], sizes: Sequence[int | None], config: GPTDatasetConfig) -> list[Samples | None]:
    built: list[Samples | None] = [None] * len(Split)
    try:
        for part, wanted in _by_weights(config, sizes):
            for split, dataset in enumerate(LocalBuilder(kind, wanted, part).build()):
                built[split] = built[split] if dataset is None else dataset
        return built
    except (AssertionError, IndexError, ValueError, RuntimeError) as error:
        raise DatasetError(_explain(error, config)) from error


def _by_weights(
    config: GPTDatasetConfig, sizes: Sequence[int | None]
) -> list[tuple[GPTDatasetConfig, Sequence[int | None]]]:
    """The configurations to build, separately for weighted sets and for sets of one epoch.

    An epoch contains each dataset once, whatever its weight; Megatron-Core refuses weights for it.
    """
    weighted = [blend for blend in (config.blend, *(config.blend_per_split or ())) if blend and blend[1]]
    if config.mock or not weighted or None not in sizes:
        return [(config, sizes)]
    sampled, whole = copy.copy(config), copy.copy(config)
    for part, blends in ((sampled, lambda blend: blend), (whole, lambda blend: blend and (blend[0], None))):
        part.blend = blends(config.blend)
        part.blend_per_split = config.blend_per_split and list(map(blends, config.blend_per_split))
        part.split_matrix = config.blend and list(config.split_matrix)
    for split in Split:
        _leave_out(sampled if sizes[split.value] is None else whole, split)
    return [(sampled, [size or 0 for size in sizes]), (whole, sizes)]


def _explain(error: Exception, config: GPTDatasetConfig) -> str:
    names = ", ".join(sorted(_prefixes(config))) or "mock data"
    return (
        f"{names}: cannot draw samples of {config.sequence_length} tokens with split {config.split!r}: "
        f"a part is too small, or empty ({type(error).__name__}: {error}). Use more data, another --split, "
        "or a shorter --seq-length"
    )


def _fill_cache(kind: type[Any], sizes: Sequence[int | None], config: GPTDatasetConfig) -> str:
    """Build the missing index files in the cache; returns its folder."""

    def build(aside: Path) -> list[Samples | None]:
        staged = copy.copy(config)
        staged.path_to_cache = str(aside)
        return _build(kind, sizes, staged)

    for folder in _cache_folders(config):
        try:
            index_cache.fill(Path(folder), build)
            return folder
        except OSError as error:
            problem = f"{folder}: the index of the dataset cannot be stored ({error.strerror or error})"
    raise DatasetError(f"{problem}; give a folder that all nodes see with --data-cache-path")


def _cache_folders(config: GPTDatasetConfig) -> list[str]:
    """Folders to try, in order: --data-cache-path, or upstream's folder next to the data.

    If that is not writable, the user's own cache folder is tried on a single node.
    """
    if config.path_to_cache:
        return [config.path_to_cache]
    blend = config.blend or next(filter(None, config.blend_per_split))
    folders = [Path(blend[0][0]) / "cache" / "GPTDataset_indices"]
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folders.append(own / "megatron_ext" / "GPTDataset_indices")
    return [str(folder) for folder in folders]

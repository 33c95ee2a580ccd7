"""Runs the source model on calibration text, in a job of data parallel ranks."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_ext import platform
from megatron_ext.arguments.parser import configured
from megatron_ext.checkpoint import load_checkpoint
from megatron_ext.config import RunConfig
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.data import build_data_loader, build_datasets
from megatron_ext.inherit.axes import Axis, axes_of
from megatron_ext.inherit.calibration import (
    Loss,
    TokenWindows,
    fill,
    frozen_model,
    mean_loss,
    read_documents,
    translated,
)
from megatron_ext.inherit.gains import gain_factors
from megatron_ext.inherit.options import InheritOptions
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.vocabulary import Rows
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.tokenizer_files import TokenizerFiles
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.tokenizer.build import Tokenizer
from megatron_ext.training import distributed
from megatron_ext.training.batch import Batch, next_batch


def tokenizer_of(files: TokenizerFiles) -> Tokenizer:
    """Build the tokenizer of these files."""
    model = None if files.model is None else str(files.model)
    return build_tokenizer(
        TokenizerConfig(tokenizer_type=files.kind, tokenizer_model=model, vocab_size=files.size - 1)
    )


class CalibrationRun:
    """Runs the source, frozen, on windows of text and on streams of samples; every call is collective.

    Uses the target's vocabulary from the start, because the target will read text in these ids. A unit that
    matters for the source's ids may not matter for them.

    Args:
        options: the options of tools/inherit_checkpoint.py.
        source: the source model; its tensors are read once, into a model on this rank's device.
        files: the target's tokenizer.
        rows: the source's rows that the target's pieces start from; None if they are the same.

    Raises:
        ValueError: the dataset is missing, damaged, too small or of another tokenizer, or a flag does
            not fit the model.
    """

    def __init__(self, options: InheritOptions, source: Source, files: TokenizerFiles, rows: Rows | None):
        self.options, self.config, self.tokenizer = options, source.model, tokenizer_of(files)
        self.dtype = _dtype(options.calibration_dtype, source.dtype)
        if rows is not None:
            self.config = dataclasses.replace(
                source.model, softmax_vocab_size=len(rows), padded_vocab_size=len(rows)
            )
        self.run = self._configuration(self.config, files)
        distributed.initialize(self.run)
        self.ranks = self.run.parallel.data_parallel_size
        self.dataset = build_datasets(self.run, self.tokenizer, (self._samples(), 0, 0))[0]
        self.documents = read_documents(
            options.data_path or [], options.calibration_samples * options.seq_length + 1
        )
        self.windows = TokenWindows.of(self.documents, options.seq_length)
        if not self.windows.counted.any():
            raise ValueError(
                f"--data-path {' '.join(options.data_path or [])}: has no two tokens to measure a loss on"
            )
        self.losses = {}
        if rows is not None:
            self.losses["loss_before"] = self._loss_of_source(source)
        self.model = frozen_model(self.run)
        fill(self.model, lambda key: _with_rows(key, source.get(key), rows))
        self.losses["loss_before" if rows is None else "loss_with_target_vocabulary"] = self.loss()

    def _loss_of_source(self, source: Source) -> Loss:
        """The loss of the source on the same text in its own ids; frees its model afterwards."""
        files = source.tokenizer
        assert files is not None  # matched with the target's
        tokenizer = tokenizer_of(files)
        model = frozen_model(self._configuration(source.model, files, with_data=False))
        fill(model, source.get)
        windows = TokenWindows.of(
            translated(self.documents, self.tokenizer, tokenizer), self.options.seq_length
        )
        return mean_loss(model, windows, self.options.micro_batch_size, tokenizer.token_bytes())

    def _samples(self) -> int:
        options = self.options
        learned = options.mask_steps * options.mask_batch_size * (options.width_criterion == "learned")
        return max(options.calibration_samples, learned)

    def _configuration(self, model: ModelConfig, files: TokenizerFiles, with_data: bool = True) -> RunConfig:
        """The trainer's configuration for ``model`` and the calibration data."""
        options = self.options
        data: dict[str, Any] = {"mock_data": True}
        if with_data:
            data = {"data_path": options.data_path, "split": "100,0,0"}
            data["data_cache_path"] = options.data_cache_path
        return configured(
            # Padding rows would be part of the softmax.
            vars(model.without_padding)
            | data
            | {
                "make_vocab_size_divisible_by": 1,
                "seq_length": options.seq_length,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
                "bf16": self.dtype == torch.bfloat16,
                "tokenizer_type": files.kind,
                "tokenizer_model": None if files.model is None else str(files.model),
                "vocab_size": model.vocab_size,
                "micro_batch_size": options.micro_batch_size,
                "seed": options.seed,
                "train_iters": 1,
                "lr": 1e-4,
            }
        )

    def loss(self) -> Loss:
        """The current loss of the model on the calibration windows."""
        return mean_loss(
            self.model, self.windows, self.options.micro_batch_size, self.tokenizer.token_bytes()
        )

    def batches(self) -> Iterator[Batch]:
        """This rank's microbatches of the calibration samples, for criteria that need gradients."""
        count = self.options.calibration_samples // (self.options.micro_batch_size * self.ranks)
        return islice(self._stream(0), max(1, count))

    def steps(self, step: int) -> Iterator[list[Batch]]:
        """This rank's microbatches of each step of mask training, from ``step`` on."""
        size = self.options.mask_batch_size
        stream = self._stream(step * size)
        while microbatches := list(islice(stream, size // (self.options.micro_batch_size * self.ranks))):
            yield microbatches

    def _stream(self, consumed: int) -> Iterator[Batch]:
        loader = iter(build_data_loader(self.dataset, self.run, consumed))
        while True:
            try:
                batch = next_batch(loader)
            except StopIteration:
                return
            assert batch is not None  # None only on pipeline stages without data
            yield batch

    def gain_factors(self, target: ModelConfig, selection: Selection) -> dict[str, float]:
        """The factors of the gains of ``target``'s norms (:mod:`gains`)."""
        return gain_factors(self.model, self.config, target, selection, self.batches())

    def loss_of_checkpoint(self, save: str, target: ModelConfig, files: TokenizerFiles) -> Loss:
        """The loss of a checkpoint on the same text; frees the source's model first."""
        self.model = None
        run = self._configuration(target, files)
        model = frozen_model(run)
        if load_checkpoint(save, model=[model], run=run, finetune=True) is None:
            raise FileNotFoundError(f"--save {save}: the checkpoint is not to be seen on this rank")
        return mean_loss(model, self.windows, self.options.micro_batch_size, self.tokenizer.token_bytes())


def _dtype(given: str | None, stored: torch.dtype) -> torch.dtype:
    """The number format of the calibration: by default the stored one on a GPU and fp32 on a CPU."""
    if given:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[given]
    return stored if platform.on_gpu() else torch.float32


def _with_rows(key: str, weights: Tensor, rows: Rows | None) -> Tensor:
    """Select the rows of the target's vocabulary, if the tensor has a vocabulary axis."""
    return weights if rows is None or Axis.VOCABULARY not in axes_of(key) else rows.take(weights)

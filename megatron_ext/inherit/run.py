"""Implements tools/inherit_checkpoint.py: open, select, slice, write, measure, report."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ext import platform
from megatron_ext.checkpoint import folders
from megatron_ext.checkpoint.errors import on_rank_0
from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit import report
from megatron_ext.inherit.options import InheritOptions
from megatron_ext.inherit.select import SelectionResult, select
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.slicing import cut, grown, rescaled, source_key
from megatron_ext.inherit.target import InheritanceError, of_layers, target_model
from megatron_ext.inherit.vocabulary import Rows, match_tokenizers
from megatron_ext.interchange import tokenizer_files
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.interchange.tokenizer_files import TokenizerFiles
from megatron_ext.platform.collective import rank

#: Tensors of the pi modules, of which a target may have more than its source.
_PI = (".series_activation.", ".augmented_shortcut.")
_INIT_STD = 0.02


def inherit(options: InheritOptions) -> dict[str, Any]:
    """Write the target's checkpoint to ``options.save``; returns the report.

    Raises:
        ValueError, OSError: an input cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    source = open_source(
        options.load,
        options.allow_pickle,
        iteration=options.ckpt_step,
        tokenizer_model=options.tokenizer_model,
    )
    for note in source.notes:
        print(f"WARNING: {note}", file=sys.stderr)
    if there := folders.list_iterations(Path(options.save)):
        raise InheritanceError(
            [f"--save {options.save} holds checkpoints already ({there}): give a new folder"]
        )
    files, rows = _target_tokenizer(options, source)
    vocab_size = source.model.vocab_size if rows is None else len(rows)
    target = target_model(options, source.model, vocab_size)
    calibration = _calibration(options, source, files, rows)
    result = select(options, source, target, calibration)
    target = of_layers(target, source.model, result.selection.layers.tolist())
    factors: dict[str, float] = {}
    if calibration is not None and options.rescale_norms:
        factors = calibration.gain_factors(target, result.selection)
    _write(options, source, target, files, rows, result.selection, factors)
    losses = {}
    if calibration is not None:
        losses = calibration.losses | {
            "loss_after": calibration.loss_of_checkpoint(options.save, target, files)
        }
    summary = _summary(source, target, rows, result)
    summary |= {name: vars(loss) for name, loss in losses.items()}
    if factors:
        summary["gain_factors"] = factors
    if with_vocabulary := losses.get("loss_with_target_vocabulary"):
        cost = with_vocabulary.bits_per_byte - losses["loss_before"].bits_per_byte
        summary["vocabulary"]["cost_bits_per_byte"] = cost
    summary["seconds"] = round(time.perf_counter() - started, 2)
    summary["peak_memory_gib"] = round(platform.max_resident_bytes() / 2**30, 3)
    if rank() == 0:
        report.write(Path(options.report or Path(options.save) / "inheritance"), summary, result)
    return summary


def _target_tokenizer(options: InheritOptions, source: Source) -> tuple[TokenizerFiles | None, Rows | None]:
    """The target's tokenizer, and the source rows of its pieces (None: the same rows)."""
    if not options.target_tokenizer_model:
        return source.tokenizer, None
    if source.tokenizer is None:
        raise InheritanceError(
            [
                f"{source.path} does not say where its tokenizer is: give --tokenizer-model, or leave out "
                "--target-tokenizer-model"
            ]
        )
    from megatron_ext.inherit.calibration_run import tokenizer_of

    files = tokenizer_files.of_path(options.target_tokenizer_model)
    if files.sha256 == source.tokenizer.sha256:
        return files, None
    return files, match_tokenizers(tokenizer_of(files), tokenizer_of(source.tokenizer))


def _calibration(
    options: InheritOptions, source: Source, files: TokenizerFiles | None, rows: Rows | None
) -> Any:
    """The calibration run of the source; None without --data-path."""
    if not options.data_path:
        return None
    if files is None:
        raise InheritanceError([f"{source.path} does not say where its tokenizer is: give --tokenizer-model"])
    from megatron_ext.inherit.calibration_run import CalibrationRun

    return CalibrationRun(options, source, files, rows)


def target_tensor(
    key: str, source: Source, target: ModelConfig, selection: Selection, rows: Rows | None, seed: int
) -> Tensor:
    """Compute one tensor of the target, by its name in checkpoints."""
    from_key = source_key(key, selection)
    there = source.model.parameters()
    if key == "output_layer.weight" and key not in there:  # the source ties it to the embedding
        from_key = "embedding.word_embeddings.weight"
    weights = cut(key, source.get(from_key), selection, source.model, rows) if from_key in there else None
    size = target.without_padding.parameters()[key]
    if any(name in key for name in _PI) and (weights is None or weights.shape != size):
        return grown(key, weights, size, lambda size: _sampled(key, size, seed))
    return weights


def _sampled(key: str, size: tuple[int, ...], seed: int) -> Tensor:
    from megatron_ext.models.initialization import parameter_seed

    generator = torch.Generator().manual_seed(parameter_seed(seed, key))
    return nn.init.normal_(torch.empty(size), std=_INIT_STD, generator=generator)


def _write(
    options: InheritOptions,
    source: Source,
    target: ModelConfig,
    files: TokenizerFiles | None,
    rows: Rows | None,
    selection: Selection,
    factors: dict[str, float],
) -> None:
    """Write the checkpoint on the first rank, tensor by tensor; raises on all ranks if that fails."""

    def write() -> None:
        with report.progress("writing", len(target.parameters())) as progress:

            def tensor(key: str) -> Tensor:
                progress.add(text=key)
                weights = target_tensor(key, source, target, selection, rows, options.seed)
                return rescaled(weights, factors[key], target) if key in factors else weights

            write_checkpoint(options.save, target, source.dtype, tensor, tokenizer=files)

    if torch.distributed.is_initialized():
        on_rank_0(f"write --save {options.save}", write)
    else:
        write()


def _summary(
    source: Source, target: ModelConfig, rows: Rows | None, result: SelectionResult
) -> dict[str, Any]:
    """The report's numbers."""

    def description(model: ModelConfig) -> dict[str, Any]:
        return report.facts(model, source.dtype) | {"parameters": model.without_padding.num_parameters}

    return {
        "source": {"path": str(source.path), "description": source.description} | description(source.model),
        "target": description(target),
        "vocabulary": _vocabulary(source.model.vocab_size, rows),
        **result.summary(),
    }


def _vocabulary(size: int, rows: Rows | None) -> dict[str, Any]:
    if rows is None:
        return {"copied": size, "averaged": 0, "dropped": 0}
    copied = rows.counts == 1
    used = set(rows.ids[rows.starts[:-1][copied]].tolist())
    return {"copied": int(copied.sum()), "averaged": int((~copied).sum()), "dropped": size - len(used)}

"""tools/convert_checkpoint.py from flags to files."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext import platform
from megatron_ext.common.progress import Progress
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.export import SHARD_BYTES, export_folder
from megatron_ext.interchange.numbers import DTYPES
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.options import ConvertOptions
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.target import write_checkpoint


def convert(options: ConvertOptions, quiet: bool = False) -> dict[str, Any]:
    """Open, convert tensor by tensor, write; the summary of what was done.

    Raises:
        InterchangeError: bad input, nothing was written.
    """
    started = time.monotonic()
    source = open_source(
        options.load,
        options.allow_pickle,
        iteration=options.ckpt_step,
        tokenizer_model=options.tokenizer_model,
    )
    if source.kind != options.source:
        raise InterchangeError(f"--from {options.source}: {options.load} is a {source.kind} folder")
    if options.target == "hf" and source.tokenizer is None and not options.tokenizer_model:
        _say_no_tokenizer(source)
    for note in source.notes:
        print(f"WARNING: {note}", file=sys.stderr)
    dtype = DTYPES.get(options.dtype, source.dtype)
    parameters = source.model.without_padding.num_parameters
    with Progress("converting", parameters * source.dtype.itemsize, "B", quiet=quiet) as progress:
        written = _write(options, source, dtype, progress)
    return {
        "from": source.description,
        "to": str(written),
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": source.tokenizer.kind if source.tokenizer else None,
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": platform.max_resident_bytes(),
    }


def _write(options: ConvertOptions, source: Source, dtype: torch.dtype, progress: Progress) -> Path:
    def get(key: str) -> Tensor:
        tensor = source.get(key)
        progress.add(tensor.nbytes, key)
        return tensor

    if options.target == "megatron":
        return write_checkpoint(options.save, source.model, dtype, get, tokenizer=source.tokenizer)
    return export_folder(
        options.save,
        source.model,
        dtype,
        get,
        tokenizer=source.tokenizer,
        architecture=options.hf_architecture,
        origin=source.origin,
        shard_bytes=options.max_shard_size or SHARD_BYTES,
    )


def _say_no_tokenizer(source: Source) -> None:
    print(
        f"WARNING: {source.path} has no tokenizer (or its files moved): the folder is written without one, "
        f"with all {source.model.vocab_size} rows of the embedding; --tokenizer-model gives it",
        file=sys.stderr,
    )

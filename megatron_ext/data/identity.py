"""Identifies the training set that a file of losses or an index of samples refers to.

A sample's number is only meaningful together with everything that determines the samples and their order: the
data, its training split, the sequence length, the seed, the tokenizer, and the number of samples
(Megatron-Core shuffles whole epochs, and the number decides how many). The location of the data does not
matter: a source is identified by its content.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.common.files import sha256
from megatron_ext.config import RunConfig
from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.manifest import TokenizerLike, read_manifest

if TYPE_CHECKING:
    from megatron_ext.data.views import Samples

#: Number and size in bytes of the evenly spread pieces that are read of each file of a source.
PIECES, PIECE_BYTES = 64, 1 << 14
#: Number of samples whose tokens are compared.
PROBES = 16


def identify(run: RunConfig, tokenizer: TokenizerLike, samples: int) -> dict[str, Any]:
    """Describe everything that determines the first ``samples`` samples of the training set.

    Reads about a megabyte of each file, whatever its size. ``tokenizer`` is the result of build_tokenizer.
    """
    # Imported here, because it imports torch, which tools/build_round.py does not need.
    from megatron_ext.data.datasets import dataset_config

    config = dataset_config(run, tokenizer)
    if config.mock:
        blend, part = (["mock"], None), config.split_matrix[0]
        fingerprints = ["mock"]
    else:
        blend = config.blend or config.blend_per_split[0]
        part = config.split_matrix[0] if config.blend else (0.0, 1.0)
        fingerprints = [fingerprint(prefix) for prefix in blend[0]]
    weights = np.array(blend[1] or [1.0] * len(fingerprints))
    return {
        "sources": [Path(prefix).name for prefix in blend[0]],
        "fingerprints": fingerprints,
        # Without weights a blend contains each dataset once, which is not the same as equal weights.
        "weights": None if blend[1] is None else (weights / weights.sum()).tolist(),
        "documents": list(part) if part else None,
        "seq_length": run.data.seq_length,
        "seed": run.init.seed,
        "tokenizer_sha256": tokenizer.sha256,
        "samples": samples,
    }


def stated(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The training set according to the arguments in a checkpoint, as fields of :func:`identify`.

    For checkpoints without a description, such as Megatron-LM's. The datasets' paths are not included: the
    data may have moved.
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    given = {name: saved.get(name) for name in ("seed", "seq_length", "dataloader_type")}
    given["mock"] = saved.get("mock_data")
    split = saved.get("split")
    if split is not None and not given["mock"]:
        part = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[0]
        given["documents"] = list(part) if part else None
    iterations, batch = saved.get("train_iters"), saved.get("global_batch_size")
    given["samples"] = saved.get("train_samples")
    if given["samples"] is None and iterations is not None and batch is not None:
        given["samples"] = iterations * batch
    return {name: value for name, value in given.items() if value is not None}


def fingerprint(prefix: str) -> str:
    """sha256 over size and evenly spread pieces of PREFIX.bin and .idx, and the manifest's checksums."""
    digest = hashlib.sha256()
    for suffix in ("bin", "idx"):
        with open(f"{prefix}.{suffix}", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{suffix} {size} ".encode())
            for start in np.unique(np.linspace(0, max(size - PIECE_BYTES, 0), PIECES).astype(np.int64)):
                file.seek(int(start))
                digest.update(file.read(PIECE_BYTES))
    files = (read_manifest(prefix) or {}).get("files", {})
    digest.update(json.dumps(files, sort_keys=True).encode())
    return digest.hexdigest()


def probe(dataset: "Samples", samples: int) -> str:
    """sha256 over the tokens of some samples: another Megatron-Core or NumPy may change their order."""
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, samples - 1, PROBES).astype(np.int64)).tolist():
        digest.update(np.ascontiguousarray(dataset[number]["tokens"], dtype=np.int64).tobytes())
    return digest.hexdigest()


def dataset_hash(identity: dict[str, Any]) -> str:
    """A sha256 over everything that determines the samples, without file names."""
    hashed = {name: value for name, value in identity.items() if name not in ("sources", "hash")}
    return sha256(json.dumps(hashed, sort_keys=True))


def _share(part: list[float] | None) -> str:
    return "none" if part is None else f"{part[0]:.4%} to {part[1]:.4%}"


def _short(text: str | None) -> str:
    return str(text)[:12]


#: Field -> the flag that sets it, and a function to print its value.
_FIELDS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "fingerprints": ("--data-path", lambda values: " ".join(map(_short, values))),
    "weights": ("the weights of the blend", lambda values: values and [round(value, 6) for value in values]),
    "documents": ("--split", _share),
    "seq_length": ("--seq-length", str),
    "seed": ("--seed", str),
    "tokenizer_sha256": ("--tokenizer-model", _short),
    "mock": ("--mock-data", str),
    "dataloader_type": ("--dataloader-type", str),
    "samples": ("samples drawn (--train-iters x --global-batch-size, or --train-samples)", str),
    "probe": ("the order of the samples (another version of Megatron-Core?)", _short),
}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The differences of two descriptions in the fields of ``ours``, a phrase each."""
    return [
        f"{flag}: {shown(theirs.get(name))} there, {shown(ours[name])} here"
        for name, (flag, shown) in _FIELDS.items()
        if name in ours and theirs.get(name) != ours[name]
    ]


def require_same(theirs: dict[str, Any], ours: dict[str, Any], of: str, advice: str) -> None:
    """Raise unless two descriptions agree in every field of ``ours``.

    Args:
        theirs, ours: results of :func:`identify`, with or without a ``probe``.
        of: the origin of ``theirs``, such as the path of an index.
        advice: what to do, the end of the message.

    Raises:
        DatasetError: naming every field that differs, with both values.
    """
    if wrong := differences(theirs, ours):
        raise DatasetError(f"{of} belongs to another training set: {'; '.join(wrong)}. {advice}")

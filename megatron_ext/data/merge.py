"""Concatenates several datasets into one, as Megatron-LM's merge_datasets.py does."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.common.files import refuse_overwriting, unchanged
from megatron_ext.data.indexed import DatasetError, Index, bin_path, dataset_files, idx_path
from megatron_ext.data.manifest import check_dataset, read_manifest, refuse_replacing_others
from megatron_ext.data.writer import file_blocks, publish, write_dataset


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """The datasets in ``inputs``: prefixes, .bin or .idx files, or folders (sorted by name).

    If a folder of cached indices has the same name as a dataset, the name refers to the dataset.

    Raises:
        DatasetError: a folder without datasets, a .bin without .idx, or a .idx without .bin.
    """
    prefixes = []
    for word in inputs:
        if Path(word).is_dir() and not idx_path(word).is_file():
            names = {
                str(path.with_suffix("")) for path in Path(word).iterdir() if path.suffix in (".bin", ".idx")
            }
            if not names:
                raise DatasetError(f"--input {word}: the folder holds no datasets (.bin and .idx)")
            prefixes += sorted(names)
        else:
            prefixes.append(word.removesuffix(".bin").removesuffix(".idx"))
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise DatasetError(f"{path}: there is no such file")
    return prefixes


def merge(prefixes: Sequence[str], output_prefix: str | Path) -> dict[str, Any]:
    """Write the documents of all ``prefixes``, in this order, as one dataset; returns its manifest.

    Needs 28 bytes of memory per document.

    Raises:
        DatasetError: a dataset is damaged, or two were made with different tokenizers, id types or ends
            of documents.
        ValueError: a dataset would be overwritten, or changed during the merge.
    """
    files = [path for prefix in prefixes for path in dataset_files(prefix)]
    refuse_overwriting(dataset_files(output_prefix), files)
    refuse_replacing_others(output_prefix)
    with unchanged(files):
        indices = [check_dataset(prefix) for prefix in prefixes]
        manifests = [read_manifest(prefix) or {} for prefix in prefixes]
        _check_same(prefixes, [index.dtype for index in indices], "ids of type")
        known = [(p, m["tokenizer"]["sha256"]) for p, m in zip(prefixes, manifests, strict=True) if _knows(m)]
        _check_same([p for p, _ in known], [sha256[:12] for _, sha256 in known], "the tokenizer")
        ended = [
            (p, m["options"]["append_eod"]) for p, m in zip(prefixes, manifests, strict=True) if _says(m)
        ]
        _check_same([p for p, _ in ended], [end for _, end in ended], "--append-eod")
        written = write_dataset(
            output_prefix,
            (block for pair in zip(prefixes, manifests, strict=True) for block in _checked_blocks(*pair)),
            indices[0].dtype,
            np.concatenate([index.lengths for index in indices]),
            _joined_documents(indices),
        )
    manifest = _joined_manifest(prefixes, manifests, indices[0].dtype)
    publish(written, manifest)
    return written.counts() | manifest


def _checked_blocks(prefix: str, manifest: dict[str, Any]) -> Iterator[bytes]:
    """The content of PREFIX.bin, compared with the manifest while it is read."""
    digest = hashlib.sha256()
    for block in file_blocks(bin_path(prefix)):
        digest.update(block)
        yield block
    expected = manifest.get("files", {}).get("bin", {}).get("sha256")
    if expected not in (None, digest.hexdigest()):
        raise DatasetError(
            f"{bin_path(prefix)}: its sha256 is not the manifest's: it was changed or damaged; copy it "
            "again or make the dataset again"
        )


def _joined_documents(indices: list[Index]) -> np.ndarray:
    bounds, offset = [np.zeros(1, dtype=np.int64)], 0
    for index in indices:
        bounds.append(index.documents[1:] + offset)
        offset += len(index.lengths)
    return np.concatenate(bounds)


def _knows(manifest: dict[str, Any]) -> bool:
    return bool(manifest.get("tokenizer", {}).get("sha256"))


def _says(manifest: dict[str, Any]) -> bool:
    """Whether the manifest states if documents end with an end of document id."""
    return "append_eod" in manifest.get("options", {})


def _check_same(prefixes: Sequence[str], values: Sequence[object], what: str) -> None:
    for prefix, value in zip(prefixes, values, strict=True):
        if value != values[0]:
            raise DatasetError(
                f"{prefix} has {what} {value}, {prefixes[0]} {values[0]}: they cannot be one dataset; "
                "make them with one tokenizer, or blend them with --data-path"
            )


def _joined_manifest(
    prefixes: Sequence[str], manifests: list[dict[str, Any]], dtype: np.dtype
) -> dict[str, Any]:
    """The manifest of the result, without entries that one of the datasets lacks."""
    joined: dict[str, Any] = {
        "dtype": np.dtype(dtype).name,
        "merged_from": [Path(prefix).name for prefix in prefixes],
    }
    if all(map(_says, manifests)):
        joined["options"] = {"append_eod": manifests[0]["options"]["append_eod"]}
    if not all(map(_knows, manifests)):
        return joined
    joined["tokenizer"] = manifests[0]["tokenizer"]
    inputs = {entry["name"]: entry for manifest in manifests for entry in manifest.get("inputs", [])}
    joined["inputs"] = list(inputs.values())
    counts = [manifest.get("lines", {}) for manifest in manifests]
    joined["lines"] = {name: sum(count.get(name, 0) for count in counts) for name in counts[0]}
    return joined

"""The manifest of a dataset: ``PREFIX.json`` describes how PREFIX.bin and PREFIX.idx were made.

    {"format": "megatron_ext.dataset/1", "dtype": "uint16", "documents": ..., "tokens": ...,
     "files": {"bin": {"bytes": ..., "sha256": ..., "pieces_sha256": ...}, "idx": {...}},
     "tokenizer": {"type": ..., "name": ..., "sha256": ..., "vocab_size": ..., "eod": ...},
     "options": {...}, "inputs": [{"name": ..., "bytes": ..., "sha256": ...}], "lines": {...}}

Datasets of other tools have no manifest; they are checked as far as possible without one.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.common.files import pieces_digest, refuse_replacing, sha256_file, write_json
from megatron_ext.data.indexed import DatasetError, Index, bin_path, check_layout, manifest_path, map_tokens

FORMAT = "megatron_ext.dataset/1"
#: Number and length of the evenly spread pieces of ids that are checked without a manifest.
SAMPLED_PIECES, SAMPLED_IDS = 64, 16384


class TokenizerLike(Protocol):
    """The interface of tokenizers that data needs; ``megatron_ext/tokenizer/build.py`` implements it."""

    vocab_size: int
    eod: int
    eos: int
    pad: int
    sha256: str

    def detokenize(self, ids: Sequence[int]) -> str: ...


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """The manifest of a dataset, or None if there is none.

    Raises:
        DatasetError: PREFIX.json exists but is not a manifest, or has invalid entries.
    """
    path = manifest_path(prefix)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
        _require_form(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a dataset's manifest ({error}); remove or restore it") from error
    return manifest


_KINDS = {
    **dict.fromkeys(("documents", "sequences", "tokens"), int),
    **dict.fromkeys(("files", "tokenizer", "options", "lines"), dict),
    **dict.fromkeys(("inputs", "merged_from"), list),
}


def _require_form(manifest: dict[str, Any]) -> None:
    """Raise ValueError for an entry of another type, and for a file that is not .bin or .idx."""
    for name, kind in _KINDS.items():
        if type(manifest.get(name, kind())) is not kind:
            raise ValueError(f"its {name!r} is not of type {kind.__name__}")
    for suffix, facts in manifest.get("files", {}).items():
        if suffix not in ("bin", "idx"):
            raise ValueError(f"its files may be bin and idx, not {suffix!r}")
        sound = isinstance(facts, dict) and type(facts.get("bytes")) is int
        if not sound or not all(isinstance(facts.get(key, ""), str) for key in ("sha256", "pieces_sha256")):
            raise ValueError(f"what it says of the file {suffix!r} is not of the form that it has here")
    tokenizer = manifest.get("tokenizer", {})
    if not all(isinstance(tokenizer.get(key, ""), str | None) for key in ("sha256", "name")):
        raise ValueError("its 'tokenizer' has another form")
    if not all(isinstance(entry, dict) for entry in manifest.get("inputs", [])):
        raise ValueError("its 'inputs' have another form")


def refuse_replacing_others(prefix: str | Path) -> None:
    """Raise OverwritesInput if PREFIX.json exists and is not the manifest of a dataset."""
    refuse_replacing(manifest_path(prefix), FORMAT)


def write_manifest(prefix: str | Path, manifest: dict[str, Any]) -> None:
    """Write PREFIX.json atomically; it is the last file of a dataset to appear."""
    write_json(manifest_path(prefix), {"format": FORMAT} | manifest)


def check_dataset(prefix: str | Path, tokenizer: TokenizerLike | None = None) -> Index:
    """Check that a dataset is complete and was made with ``tokenizer``; takes a fraction of a second.

    The index, and a .bin of up to 16 MiB, are compared with the manifest completely, a longer .bin
    in pieces (``inspect.verify`` reads everything).

    Raises:
        DatasetError: it is truncated, altered, mixed up with another, or of another tokenizer.
    """
    index = check_layout(prefix)
    manifest = read_manifest(prefix)
    if manifest is not None:
        _check_files(prefix, manifest)
    if tokenizer is None:
        return index
    if manifest is not None and manifest.get("tokenizer", {}).get("sha256"):
        _check_tokenizer(prefix, manifest["tokenizer"], tokenizer)
    else:
        _check_largest_id(prefix, index, tokenizer.vocab_size)
    return index


def _check_files(prefix: str | Path, manifest: dict[str, Any]) -> None:
    for suffix, facts in manifest.get("files", {}).items():
        path = Path(f"{prefix}.{suffix}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise DatasetError(
                f"{path}: {size:,} bytes, but {manifest_path(prefix).name} says {facts['bytes']:,}: "
                "it was replaced or cut off; make the dataset again"
            )
        if not _is_same(suffix, path, facts):
            raise DatasetError(
                f"{path}: was altered or replaced since {manifest_path(prefix).name} was written; "
                "copy it again or make the dataset again"
            )


def _is_same(suffix: str, path: Path, facts: dict[str, Any]) -> bool:
    """Whether a file has the content described in the manifest; only pieces of a long .bin are compared."""
    # The index is read completely anyway, and one wrong number in it shifts all samples.
    if suffix == "idx" and "sha256" in facts:
        return sha256_file(path) == facts["sha256"]
    # Missing in manifests of earlier versions.
    return "pieces_sha256" not in facts or pieces_digest(path) == facts["pieces_sha256"]


def _check_tokenizer(prefix: str | Path, made_with: dict[str, Any], tokenizer: TokenizerLike) -> None:
    if made_with["sha256"] == tokenizer.sha256:
        return
    raise DatasetError(
        f"{bin_path(prefix)}: was made with the tokenizer {made_with.get('name')} "
        f"({made_with.get('vocab_size')} ids, sha256 {made_with['sha256'][:12]}), not with this one "
        f"({tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}); give that --tokenizer-model, or "
        "make the dataset again with tools/preprocess_data.py. If you know that both give the same ids, "
        f'remove "tokenizer" from {manifest_path(prefix).name}'
    )


def _check_largest_id(prefix: str | Path, index: Index, vocab_size: int) -> None:
    for piece in sampled_ids(prefix, index):
        low, high = (int(piece.min()), int(piece.max())) if len(piece) else (0, 0)
        if low < 0 or high >= vocab_size:
            raise DatasetError(
                f"{bin_path(prefix)}: holds the id {high if high >= vocab_size else low}, but the tokenizer "
                f"has {vocab_size} ids: the dataset was made with another tokenizer"
            )


def sampled_ids(prefix: str | Path, index: Index) -> Iterator[np.ndarray]:
    """Evenly spread pieces of the dataset's ids; all ids of a small dataset."""
    ids = map_tokens(prefix, index)
    starts = np.unique(np.linspace(0, max(len(ids) - SAMPLED_IDS, 0), SAMPLED_PIECES).astype(np.int64))
    for start in starts.tolist():
        yield ids[start : start + SAMPLED_IDS]

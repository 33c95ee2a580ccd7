"""Checks that every set gets documents, before any dataset is built.

Megatron-Core would add epochs of an empty part until there are enough tokens, which never ends.
"""

from collections.abc import Iterator, Sequence

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_ext.data.indexed import DatasetError, Index


def check_parts(
    config: GPTDatasetConfig, indices: dict[str, Index], sizes: Sequence[int | None], split: str | None
) -> None:
    """Raise DatasetError, naming all of them, if a set gets no text, or no sample per epoch, from a dataset.

    Args:
        indices: the index of each prefix.
        sizes: number of samples of each set; None means one epoch.
        split: the value of ``--split``.
    """
    problems = []
    for prefix, index in indices.items():
        parts = list(_parts_of(prefix, config))
        empty = [kind.name for kind, part in parts if not index.lengths[_documents(index, part)].any()]
        if empty:
            problems.append(f"{prefix}: " + _no_text(empty, index, [kind for kind, _ in parts], split))
            continue
        for kind, part in parts:
            tokens = int(index.lengths[_documents(index, part)].sum(dtype="int64"))
            once = sizes[kind.value] is None or _is_unweighted_blend(config, kind)
            if once and tokens <= config.sequence_length:
                problems.append(
                    f"{prefix}: its {kind.name} set has {tokens} tokens, which is no sample of --seq-length "
                    f"{config.sequence_length} and the token after it"
                )
    if problems:
        raise DatasetError("; ".join(problems))


def _parts_of(prefix: str, config: GPTDatasetConfig) -> Iterator[tuple[Split, tuple[float, float]]]:
    """The sets that use a prefix, each with its range as fractions of the documents."""
    for kind in Split:
        if config.blend:
            blend, part = config.blend, config.split_matrix[kind.value]
        else:
            blend, part = config.blend_per_split[kind.value], (0.0, 1.0)
        if blend is not None and part is not None and prefix in blend[0]:
            yield kind, part


def _documents(index: Index, part: tuple[float, float]) -> slice:
    """The documents of a part, rounded as in BlendedMegatronDatasetBuilder._build_megatron_dataset_splits."""
    return slice(*(int(round(bound * float(len(index.lengths)))) for bound in part))


def _is_unweighted_blend(config: GPTDatasetConfig, kind: Split) -> bool:
    """Whether the set blends several datasets without weights, that is, one epoch of each."""
    prefixes, weights = config.blend or config.blend_per_split[kind.value]
    return weights is None and len(prefixes) > 1


def _no_text(empty: list[str], index: Index, kinds: list[Split], split: str | None) -> str:
    count = len(index.lengths)
    there = f"{count} document{'s' * (count != 1)}"
    if not index.lengths.any():
        return f"its {there} hold no text"
    problem = f"its {there} leave no text for the {' set and the '.join(empty)} set with --split {split!r}, "
    problem += "whose shares are taken in whole documents (sequences) and rounded"
    if count < len(kinds):
        return (
            f"{problem}; {there} cannot be shared by {len(kinds)} sets: give --split 100,0,0, or files of "
            "their own with --train-data-path and --valid-data-path, or cut the text into more documents"
        )
    return (
        f"{problem}; the smallest shares that leave one to each set: --split {smallest_shares(count, kinds)}"
    )


def smallest_shares(documents: int, kinds: Sequence[Split]) -> str:
    """A --split that gives one document to each of the sets, and the rest to the first."""
    shares = [int(kind in kinds) for kind in Split]
    shares[min(kind.value for kind in kinds)] += documents - len(kinds)
    return ",".join(map(str, shares))

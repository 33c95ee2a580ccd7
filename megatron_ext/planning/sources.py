"""What a run reads of its sources: tokens and epochs."""

from dataclasses import dataclass

from megatron_ext.data.indexed import DatasetError, read_index
from megatron_ext.data.stages import Stage


@dataclass(frozen=True)
class Amount:
    """Tokens that a stage reads of a source; its epochs, None where the data is not on this machine."""

    prefix: str
    tokens: float
    epochs: float | None


def amounts(stage: Stage, tokens: int, training_share: float) -> list[Amount]:
    """What a stage of so many tokens reads of each of its sources.

    ``training_share``: the share of a source's documents that is in the training set.
    """
    found = []
    for share, source in zip(stage.shares(tokens), stage.blend, strict=True):
        there = tokens_there(source.prefix, training_share)
        found.append(Amount(source.prefix, share * tokens, share * tokens / there if there else None))
    return found


def tokens_there(prefix: str, training_share: float) -> int:
    """Tokens in the training part of a dataset, 0 if it is not on this machine."""
    try:
        lengths = read_index(prefix).lengths
    except DatasetError:
        return 0
    return int(lengths[: round(training_share * len(lengths))].sum(dtype="int64"))

"""Traces a sample back to its documents."""

from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

from megatron_ext.data.rounds.dataset import NumberedDataset
from megatron_ext.data.views import Chained, Samples


def trace_sample(dataset: Samples, number: int) -> dict[str, Any]:
    """The origin of sample ``number`` of a dataset.

    Returns ``{"number"}`` (in a round, the number in the first round's training set); for a GPTDataset, alone
    or in a blend, also ``"dataset"`` (its PREFIX) and ``"documents"``, the numbers of the documents in the
    sample.
    """
    if isinstance(dataset, NumberedDataset):
        return trace_sample(dataset.dataset, dataset.sample_id(number))
    origin: dict[str, Any] = {"number": int(number)}
    if isinstance(dataset, Chained):
        part, place = dataset.locate(number)
        return trace_sample(part, place) | origin
    if isinstance(dataset, BlendedDataset):
        part = dataset.datasets[int(dataset.dataset_index[number])]
        return trace_sample(part, int(dataset.dataset_sample_index[number])) | origin
    if isinstance(dataset, GPTDataset) and not isinstance(dataset, MockGPTDataset):
        place = int(dataset.shuffle_index[number])
        first, last = (int(dataset.sample_index[end][0]) for end in (place, place + 1))
        origin["dataset"] = dataset.dataset.path_prefix
        origin["documents"] = sorted({int(i) for i in dataset.document_index[first : last + 1]})
    return origin

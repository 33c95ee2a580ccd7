"""From a sample back to the documents it was cut from."""

from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

from megatron_ext.data.rounds.dataset import NumberedDataset
from megatron_ext.data.views import Chained, Samples


def trace_sample(dataset: Samples, number: int) -> dict[str, Any]:
    """Where sample ``number`` of a dataset comes from.

    ``{"number"}`` (in a round, that in the first round's training set), and of a GPTDataset, alone or
    in a blend, also ``"dataset"`` (its PREFIX) and ``"documents"``, the numbers in it of the documents
    that the sample has tokens of.
    """
    if isinstance(dataset, NumberedDataset):
        return trace_sample(dataset.dataset, dataset.sample_id(number))
    found: dict[str, Any] = {"number": int(number)}
    if isinstance(dataset, Chained):
        part, place = dataset.locate(number)
        return trace_sample(part, place) | found
    if isinstance(dataset, BlendedDataset):
        part = dataset.datasets[int(dataset.dataset_index[number])]
        return trace_sample(part, int(dataset.dataset_sample_index[number])) | found
    if isinstance(dataset, GPTDataset) and not isinstance(dataset, MockGPTDataset):
        place = int(dataset.shuffle_index[number])
        first, last = (int(dataset.sample_index[end][0]) for end in (place, place + 1))
        found["dataset"] = dataset.dataset.path_prefix
        found["documents"] = sorted({int(i) for i in dataset.document_index[first : last + 1]})
    return found

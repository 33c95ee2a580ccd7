"""How much of its data a run reads: epochs, and datasets of a blend without a sample."""

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ext.data.views import Chained


def epochs(dataset: Chained | BlendedDataset | GPTDataset, samples: int) -> float:
    """Epochs that ``samples`` of a Megatron-Core dataset are; the largest number in a blend."""
    if isinstance(dataset, Chained):
        often = 0.0
        for part in dataset.parts:
            often += epochs(part, min(samples, len(part)))
            samples = max(0, samples - len(part))
        return often
    if isinstance(dataset, BlendedDataset):
        parts = zip(dataset.datasets, dataset.weights, strict=True)
        whole = sum(dataset.weights)
        return max(epochs(part, samples * weight / whole) for part, weight in parts)
    drawn = len(dataset.document_index) / len(dataset.indices)
    return samples * drawn / len(dataset)


def without_a_sample(dataset: Chained | BlendedDataset | GPTDataset) -> list[str]:
    """The prefixes of a blend without any sample, because their weight is too small for the run."""
    if isinstance(dataset, Chained):
        return without_a_sample(dataset.parts[0])
    if not isinstance(dataset, BlendedDataset):
        return []
    # Otherwise every dataset has a sample; counting would read the whole order.
    if min(dataset.weights) / sum(dataset.weights) * len(dataset) >= 2:
        return []
    counts = np.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
    return [part.dataset_path for part, count in zip(dataset.datasets, counts, strict=True) if not count]

"""How much of its data a run reads: epochs, and datasets of a blend without a sample."""

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ext.data.views import Chained


def epochs(dataset: Chained | BlendedDataset | GPTDataset, samples: int) -> float:
    """Number of epochs in the first ``samples`` of a dataset; in a blend, the largest of its datasets."""
    if isinstance(dataset, Chained):
        total = 0.0
        for part in dataset.parts:
            total += epochs(part, min(samples, len(part)))
            samples = max(0, samples - len(part))
        return total
    if isinstance(dataset, BlendedDataset):
        parts = zip(dataset.datasets, dataset.weights, strict=True)
        whole = sum(dataset.weights)
        return max(epochs(part, samples * weight / whole) for part, weight in parts)
    built = len(dataset.document_index) / len(dataset.indices)  # the index covers this many epochs
    return samples * built / len(dataset)


def without_a_sample(dataset: Chained | BlendedDataset | GPTDataset) -> list[str]:
    """The prefixes of a blend without any sample, because their weight is too small for the run."""
    if isinstance(dataset, Chained):
        return without_a_sample(dataset.parts[0])
    if not isinstance(dataset, BlendedDataset):
        return []
    # Then every dataset has a sample; counting would read the whole order.
    if min(dataset.weights) / sum(dataset.weights) * len(dataset) >= 2:
        return []
    counts = np.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
    return [part.dataset_path for part, count in zip(dataset.datasets, counts, strict=True) if not count]

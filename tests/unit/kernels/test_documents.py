"""Packed documents: what follows from their ends is Megatron's mask, and the lengths a GPU's kernels take."""

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_ext.kernels import documents

END = 9
TEXTS = {
    "none ends": [1, 2, 3, 4, 5],
    "in the middle": [1, 2, END, 3, 4, END, 5],
    "at both ends": [END, 1, 2, 3, END],
    "empty ones": [1, END, END, END, 2],
    "one token": [END],
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_mask_is_megatrons(text):
    ids = torch.tensor(text)
    mask, _, _ = _get_ltor_masks_and_position_ids(ids, END, False, True, False, True)
    starts = documents.document_starts(ids == END)
    assert starts.dtype == torch.int32
    assert torch.equal(documents.shown(starts[None])[0], ~mask)


def test_lengths_add_up_over_the_samples():
    ends = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    starts = documents.document_starts(ends)
    assert starts.tolist() == [[0, 0, 2, 2, 2], [0, 0, 0, 0, 4]]
    assert documents.boundaries(starts).tolist() == [0, 2, 5, 9, 10]
    assert documents.boundaries(starts).dtype == torch.int32


def test_a_mask_is_told_from_starts():
    assert not documents.is_starts(None)
    assert documents.is_starts(torch.zeros(2, 5, dtype=torch.int32))
    assert not documents.is_starts(torch.zeros(2, 1, 5, 5, dtype=torch.bool))

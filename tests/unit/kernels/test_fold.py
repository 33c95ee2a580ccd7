"""A teacher's logits over a student's vocabulary: the probabilities that meet in a token are added."""

import pytest
import torch

from megatron_ext.kernels import fold
from megatron_ext.kernels.fold import fold_logits, place_logits


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_are_added(dtype, temperature, chunk, monkeypatch):
    monkeypatch.setattr(fold, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 2, 50, generator=generator) * 5).to(dtype)
    columns = torch.randint(-1, 12, (50,), generator=generator)
    columns[columns == 7] = 3  # nothing is added to 7
    probabilities = torch.softmax(logits.double() / temperature, -1)
    expected = torch.zeros(3, 2, 13, dtype=torch.float64)
    for i, column in enumerate(columns.tolist()):
        if column >= 0:
            expected[..., column] += probabilities[..., i]
    expected /= expected.sum(-1, keepdim=True)
    found = fold_logits(logits, columns, 13, temperature)
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert (found[..., [7, 12]] == -torch.inf).all()
    torch.testing.assert_close(
        torch.softmax(found.double() / temperature, -1), expected, rtol=1e-5, atol=1e-9
    )


def test_a_shard_to_which_nothing_belongs():
    assert (fold_logits(torch.zeros(2, 3, 0), torch.zeros(0, dtype=torch.int64), 5, 1.0) == -torch.inf).all()
    assert (place_logits(torch.zeros(2, 3, 0), torch.zeros(0, dtype=torch.int64), 5) == -torch.inf).all()


def test_logits_that_do_not_meet_are_only_moved():
    logits = torch.randn(4, 5).bfloat16()
    found = place_logits(logits, torch.tensor([2, -1, 0, 5, 1]), 6)
    assert torch.equal(found[:, [2, 0, 5, 1]], logits[:, [0, 2, 3, 4]])
    assert found.dtype == torch.bfloat16 and (found[:, [3, 4]] == -torch.inf).all()

"""The loss that a student with a teacher is trained on, and what is reported of it."""

import pytest
import torch

from megatron_ext.kernels.teacher_targets import WholeTargets
from megatron_ext.training.batch import Batch, LossCounter


def batch(alpha: float, taught: torch.Tensor | None) -> Batch:
    """Two samples of three tokens; the last of each does not count."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 2)
    targets = WholeTargets(torch.zeros(3, 2, 5), 3.0, None if taught is None else taught.t())
    return Batch(ids, ids, mask, ids, None, targets=targets, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("taught", [None, torch.tensor([[True, False, True], [True, True, True]])])
def test_is_the_formula_token_by_token(alpha, taught):
    entropy, divergence = torch.rand(2, 2, 3, dtype=torch.float64).float().requires_grad_().unbind(0)
    entropy.retain_grad()
    divergence.retain_grad()
    recorded = []
    counter = LossCounter(record=lambda _, losses: recorded.append(losses))
    loss, tokens, reported = counter(batch(alpha, taught), (entropy, divergence))
    counts = torch.tensor([[1.0, 1.0, 0.0]] * 2)
    learned = counts if taught is None else counts * taught
    share = alpha * learned
    expected = ((counts - share) * entropy + share * 9.0 * divergence).sum()
    torch.testing.assert_close(loss, expected)
    assert tokens == 4 and torch.equal(recorded[0], entropy)
    sums = [(entropy * counts).sum(), counts.sum(), (divergence * learned).sum(), learned.sum()]
    torch.testing.assert_close(reported["lm loss"], torch.stack(sums).double())
    loss.backward()
    torch.testing.assert_close(entropy.grad, counts - share)
    torch.testing.assert_close(divergence.grad, 9.0 * share)


def test_a_divergence_that_is_no_number_is_seen_where_it_counts():
    taught = torch.tensor([[True, False, True], [True, True, True]])
    for place, bad in (((0, 1), {}), ((0, 2), {}), ((1, 1), {0: "NaN"})):
        divergence = torch.ones(2, 3)
        divergence[place] = torch.nan
        counter = LossCounter()
        counter(batch(0.5, taught), (torch.ones(2, 3), divergence))
        assert counter.bad == bad

"""A model's loss and gradients do not depend on the vocabulary's padding rows."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.kernels import fused
from megatron_ext.models.builder import build_model, unwrap
from tests.helpers.models import model_arguments, positions, small_config
from tests.helpers.parallel import Layout

TOKENS = 200


def outcome(
    rows: int, tied: bool, softmax: int | None = TOKENS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses [b, s] and all gradients of a model with this number of vocabulary rows."""
    run = model_arguments(tied)
    run = run.but(padded_vocab_size=rows, softmax_vocab_size=softmax)
    [model] = build_model(small_config(), run)
    ids = torch.randint(TOKENS, (3, 48), generator=torch.Generator().manual_seed(0))
    losses = model(ids, positions(ids), None, labels=ids.roll(-1, 1))
    losses.mean().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kernels", [True, False], ids=["fused", "Megatron-Core's loss"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [208, 256, 1024])
def test_padding_rows_change_nothing(single_process, monkeypatch, rows, tied, kernels):
    if not kernels:
        monkeypatch.setattr(fused, "_kernels", None)
    (losses, gradients), (expected, exact) = outcome(rows, tied), outcome(TOKENS, tied)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        padding = gradient[len(exact[name]) :]
        assert not padding.any()
        torch.testing.assert_close(gradient[: len(exact[name])], exact[name], rtol=1e-5, atol=1e-8)
        assert len(padding) == (rows - TOKENS if "embedding" in name or "output" in name else 0)


@pytest.mark.parametrize("kernels", [True, False], ids=["fused", "Megatron-Core's loss"])
def test_they_do_where_they_take_part(single_process, monkeypatch, kernels):
    if not kernels:
        monkeypatch.setattr(fused, "_kernels", None)
    losses, gradients = outcome(256, False, softmax=None)
    assert losses.mean() - outcome(256, False)[0].mean() > 0.1  # ln(256 / 200) = 0.25 at the start
    assert gradients["output_layer.weight"][TOKENS:].any(dim=1).all()
    as_many = outcome(256, False, softmax=256)
    assert torch.equal(as_many[0], losses)


def losses_of_a_rank(rows: int) -> torch.Tensor:
    return outcome(rows, False)[0]


@pytest.mark.parametrize("rows", [208, 1024])
def test_each_rank_masks_its_own_padding(pool, rows):
    """Of 1024 rows on four ranks, three ranks hold only padding."""
    expected = pool.run(Layout(), losses_of_a_rank, TOKENS)[0]
    for losses in pool.run(Layout(tp=4), losses_of_a_rank, rows):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_the_loss_is_torchs_over_the_tokens_alone(single_process):
    run = model_arguments()
    run = run.but(padded_vocab_size=256, softmax_vocab_size=TOKENS)
    [model] = build_model(small_config(), run)
    ids = torch.randint(TOKENS, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = unwrap(model)(ids, positions(ids), None, labels=ids.roll(-1, 1))
        logits = model(ids, positions(ids), None)[..., :TOKENS]
    expected = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none").view(2, 48)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)

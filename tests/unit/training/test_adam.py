"""Our Adam has torch's arithmetic and Apex's state layout."""

import copy

import pytest
import torch

from megatron_ext.training.adam import FusedAdam

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((33, 7), (9,), (0,))]


def set_gradients(params: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_equals_torch(decoupled):
    ours, theirs = parameters(), parameters()
    optimizer = FusedAdam(ours, adam_w_mode=decoupled, **OPTIONS)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **OPTIONS)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_state_is_laid_out_as_apex_does():
    params = parameters()
    optimizer = FusedAdam([{"params": params}, {"params": []}], **OPTIONS)
    assert all("step" not in group for group in optimizer.state_dict()["param_groups"])
    set_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_continues_torchs_state():
    ours, theirs = parameters(), parameters()
    reference = torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(3):
        set_gradients(theirs, step)
        reference.step()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    optimizer = FusedAdam(ours, **OPTIONS)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert optimizer.param_groups[0]["step"] == 3
    assert set(optimizer.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay", "step"}
    set_gradients(ours, 3)
    set_gradients(theirs, 3)
    optimizer.step()
    reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_different_steps_are_refused():
    params = parameters()[:2]
    reference = torch.optim.AdamW(params, **OPTIONS)
    set_gradients(params, 0)
    reference.step()
    state = reference.state_dict()
    state["state"][0]["step"] = torch.tensor(5.0)
    with pytest.raises(ValueError, match="different numbers of steps"):
        FusedAdam(parameters()[:2], **OPTIONS).load_state_dict(state)

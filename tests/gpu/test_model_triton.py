"""The model with every Triton kernel against the model with none; on a GPU, or interpreted."""

import pytest
import torch

from megatron_ext.kernels import fused, launch
from tests.gpu.interpreted import DEVICE, INTERPRETED, needs_triton
from tests.helpers.models import positions, small_config, small_model, tokens
from tests.helpers.parallel import Layout

pytestmark = needs_triton


def loss_and_gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = model(ids, positions(ids).to(DEVICE), None, labels=ids.roll(-1, 1))
    losses.sum().backward()
    return {"loss": losses.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def shards_loss_and_gradients(sequence_parallel: bool) -> tuple[dict, dict]:
    """On one of two ranks: losses and gradients without the kernels, and with them."""
    config = small_config(num_layers=1, pangu_init="random", sequence_parallel=sequence_parallel)
    model = small_model(config)[0].train()
    model.softmax_vocab_size = 254
    ids = tokens(batch=2, length=8).clamp(max=253).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_kernels", None)
        plain = loss_and_gradients(model, ids)
        with launch.observed(lambda kernel: True):
            return plain, loss_and_gradients(model, ids)


@pytest.mark.skipif(not INTERPRETED, reason="the ranks are forked, which a process that uses a GPU cannot be")
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_share_heads_channels_and_vocabulary(sequence_parallel, pool):
    """Tensor parallel; the second shard of the vocabulary holds the padding."""
    ranks = pool.run(Layout(tp=2), shards_loss_and_gradients, sequence_parallel)
    assert torch.equal(ranks[0][1]["loss"], ranks[1][1]["loss"])
    for plain, found in ranks:
        for name, want in plain.items():
            torch.testing.assert_close(
                found[name], want, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_loss_and_every_gradient(groups, monkeypatch, single_process):
    """Multi-head, grouped and multi-query attention; two vocabulary rows are padding."""
    monkeypatch.setattr(fused, "_kernels", None)
    config = small_config(num_layers=1, num_query_groups=groups, pangu_init="random")
    model = small_model(config)[0].train()
    model.softmax_vocab_size = 254
    ids = tokens(batch=2, length=7).clamp(max=253).to(DEVICE)
    monkeypatch.setattr(launch, "supports", lambda *tensors: False)
    expected = loss_and_gradients(model, ids)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "_kernels", None)
    started = []
    with launch.observed(lambda kernel: started.append(kernel.kernel) or True):
        found = loss_and_gradients(model, ids)
    assert started.count("_rotate_kernel") == 4  # queries and keys, each way, in the one layer
    assert {"_forward_kernel", "_backward_kernel", "_stats_kernel", "_grad_kernel"} <= set(started)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")

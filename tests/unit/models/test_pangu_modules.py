"""The pi modules: the formulas, identity at the start, and no trace of them when they are off."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ext.kernels import fused
from megatron_ext.models.attention import ScaledDotProductAttention
from megatron_ext.models.augmented_shortcut import AugmentedShortcut
from megatron_ext.models.norm import RMSNorm
from megatron_ext.models.series_activation import SeriesActivation
from tests.helpers.models import SEQUENCE, VOCABULARY, positions, small_config, small_model, tokens


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def randomize(model, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_series_activation_is_the_formula(single_process):
    module = SeriesActivation(small_config(series_activation_order=3), tp_group())
    randomize(module)
    x = torch.randn(5, 2, 2 * 176)
    gate, up = x[..., :176], x[..., 176:]
    expected = sum(F.silu(module.scale[i] * gate + module.bias[i]) for i in range(3)) * up
    torch.testing.assert_close(module(x), expected)


def test_series_activation_is_divided_without_metadata(single_process):
    """Megatron-Core omits the metadata if the caller has none."""
    module = SeriesActivation(small_config(series_activation_order=2), tp_group())
    assert set(module.sharded_state_dict("activation.")) == {"activation.scale", "activation.bias"}


def test_shortcuts_are_the_sum_of_their_branches(single_process):
    module = AugmentedShortcut(small_config(augmented_shortcuts=3))
    for parameter in module.double().parameters():  # built empty; the model draws them
        torch.nn.init.normal_(parameter, std=0.1)
    z, output = torch.randn(2, 6, 2, 64, dtype=torch.float64)
    inner = 64 // 8
    branches = [
        F.gelu(z @ module.down[i * inner : (i + 1) * inner].T) @ module.up[:, i * inner : (i + 1) * inner].T
        for i in range(3)
    ]
    torch.testing.assert_close(module(z, output), output + sum(branches))


def tp_group():
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def test_identity_initialisation_changes_nothing(single_process):
    """Step 0 of a pi model is step 0 of the plain model, and the new parameters can learn."""
    off = small_model(small_config(series_activation_order=0, augmented_shortcuts=0))[0]
    on = small_model(small_config())[0]
    ids = tokens()
    loss_off, gradients_off = loss_and_gradients(off, ids)
    loss_on, gradients_on = loss_and_gradients(on, ids)
    torch.testing.assert_close(loss_on, loss_off, rtol=1e-7, atol=0)
    for name, gradient in gradients_off.items():
        torch.testing.assert_close(gradients_on[name], gradient, rtol=1e-5, atol=1e-8)
    learning = [name for name in gradients_on if name not in gradients_off and not name.endswith("down")]
    assert len(learning) == 3 * 2  # scale, bias and up of each layer
    assert all(gradients_on[name].abs().max() > 0 for name in learning)


def test_random_initialisation_changes_something(single_process):
    ids = tokens()
    identity, random = (small_model(small_config(pangu_init=kind))[0] for kind in ("identity", "random"))
    assert not torch.equal(identity(ids, positions(ids), None), random(ids, positions(ids), None))


def stock_model(config, layer_spec, norm=None) -> GPTModel:
    spec = layer_spec
    if norm is not None:
        layer_spec.submodules.input_layernorm = layer_spec.submodules.pre_mlp_layernorm = norm
        layer_spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
        spec = TransformerBlockSubmodules([layer_spec] * config.num_layers, norm)
    return GPTModel(
        config, spec, VOCABULARY, SEQUENCE, share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )  # fmt: skip


@pytest.mark.parametrize("same_kernels", [True, False], ids=["bit-for-bit", "own-kernels"])
def test_off_is_the_stock_model(single_process, monkeypatch, same_kernels):
    """Off, our classes add nothing: bit for bit with the same kernels, to rounding with our own."""
    if same_kernels:
        monkeypatch.setattr(fused, "_kernels", None)
    config = small_config(series_activation_order=0, augmented_shortcuts=0)
    ours = small_model(config)[0]
    theirs = stock_model(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), norm=RMSNorm if same_kernels else None
    )
    theirs.load_state_dict(ours.state_dict())
    ids = tokens()
    (loss, gradients), (their_loss, their_gradients) = (
        loss_and_gradients(model, ids) for model in (ours, theirs)
    )
    exact = dict(rtol=0, atol=0) if same_kernels else dict(rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss, their_loss, **exact)
    assert gradients.keys() == their_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], their_gradients[name], **exact)


def test_every_parameter_is_in_the_checkpoint(single_process):
    from megatron_ext.models.initialization import shards

    model = small_model(small_config())[0]
    held = {shard.data.untyped_storage().data_ptr() for shard in shards(model)}
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in held, name

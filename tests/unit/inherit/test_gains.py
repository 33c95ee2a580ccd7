"""The gains of norms that lose channels: the least squares that they solve."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.inherit.axes import axes_of, layer_of
from megatron_ext.inherit.calibration import TokenWindows
from megatron_ext.inherit.gains import _modules, gain_factors
from megatron_ext.inherit.masks import Masks, attached
from megatron_ext.inherit.slicing import kept_entries, rescaled, source_key
from megatron_ext.inherit.target import of_layers
from megatron_ext.models.norm import Norm
from tests.unit.inherit import toy
from tests.unit.inherit.test_slicing import random_models

pytestmark = pytest.mark.usefixtures("single_process")


def windows(source) -> TokenWindows:
    ids = torch.randint(0, source.vocab_size, (4 * 16 + 1,), generator=torch.Generator().manual_seed(1))
    return TokenWindows.of([ids.tolist()], 16)


def outputs(full, source, selection) -> dict[Norm, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs and outputs of each norm of the source with the kept layers, [tokens, channels]."""
    found: dict = {}

    def note(norm, inputs, output):
        size = norm.weight.numel()
        found.setdefault(norm, []).append((inputs[0].reshape(-1, size), output.reshape(-1, size)))

    masks = Masks.ones(source)
    masks.layers.zero_()[selection.layers] = 1.0
    handles = [norm.register_forward_hook(note) for norm in full.modules() if isinstance(norm, Norm)]
    with attached(full, masks), torch.no_grad():
        for batch in windows(source).batches(2):
            full(batch.tokens, batch.position_ids, None)
    for handle in handles:
        handle.remove()
    return {
        norm: [torch.cat(each).double() for each in zip(*pairs, strict=True)] for norm, pairs in found.items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_factors_bring_the_output_nearest_to_the_sources(seed):
    source, target = random_models(seed)
    selection = toy.random_selection(source, target, seed)
    target = of_layers(target, source, selection.layers.tolist())
    full = toy.model(source, seed)
    factors = gain_factors(full, source, target, selection, windows(source).batches(2))
    seen = outputs(full, source, selection)
    norms = {key for key in target.parameters() if "norm" in key}
    assert factors.keys() <= norms and "decoder.final_layernorm.weight" in factors
    for key in norms:
        norm = _modules(full)[source_key(key, selection)]
        kept = kept_entries(axes_of(key)[0], layer_of(key), selection, source)
        if len(kept) == norm.weight.numel():
            assert key not in factors
            continue
        x, y = seen[norm]
        gain = norm.gain.detach().double()[kept]
        alone, wanted = F.rms_norm(x[:, kept], gain.shape, gain, norm.eps).flatten(), y[:, kept].flatten()
        best = torch.linalg.lstsq(alone[:, None], wanted[:, None]).solution.item()
        assert factors[key] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_factor_scales_the_gain(zero_centered):
    model = toy.config(layernorm_zero_centered_gamma=zero_centered)
    weights = torch.randn(8)
    besides = float(zero_centered)
    torch.testing.assert_close(rescaled(weights, 1.5, model) + besides, 1.5 * (weights + besides))

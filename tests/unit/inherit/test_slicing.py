"""A slice computes what the full model computes with everything else masked."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from megatron_ext.inherit.masks import Masks, attached
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.slicing import grown
from megatron_ext.inherit.target import of_layers
from megatron_ext.inherit.vocabulary import Rows
from tests.unit.inherit import toy

pytestmark = pytest.mark.usefixtures("single_process")


def others(draw: random.Random, layers: int) -> dict:
    """What other makers' layers have, at random."""
    window = draw.choice((None, (4, 0)))
    return {
        "qk_layernorm": draw.choice((True, False)),
        "qk_layernorm_across_heads": draw.choice((True, False)),
        "norm_placement": draw.choice(("input", "output", "both")),
        "layernorm_zero_centered_gamma": draw.choice((True, False)),
        "no_rope_freq": tuple(draw.randint(0, 1) for _ in range(layers)),
        "window_size": window,
        "window_attn_skip_freq": window and tuple(draw.randint(0, 1) for _ in range(layers)),
        "embedding_multiplier": draw.choice((1.0, 3.0)),
        "residual_multiplier": draw.choice((1.0, 0.5)),
    }


def random_models(seed: int):
    """A source and a smaller target, of random sizes."""
    draw = random.Random(seed)
    per_group, channels, pi = draw.choice((1, 2, 3)), draw.choice((4, 8)), draw.choice((0, 1))
    groups, layers, reduction = draw.randint(2, 5), draw.randint(2, 4), draw.choice((2, 4))
    shortcuts = pi * draw.choice((1, 2))
    source = toy.config(
        num_layers=layers,
        hidden_size=reduction * draw.randint(6, 12),
        ffn_hidden_size=draw.randint(20, 60),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=channels,
        tied=draw.choice((True, False)),
        add_qkv_bias=draw.choice((True, False)),
        series_activation_order=2 * pi,
        augmented_shortcuts=shortcuts,
        augmented_shortcut_reduction=reduction,
        **others(draw, layers),
    )
    fewer = draw.randint(1, groups)
    target = dataclasses.replace(
        source,
        num_layers=draw.randint(1, layers),
        no_rope_freq=None,
        window_attn_skip_freq=None,
        hidden_size=reduction * draw.randint(3, source.hidden_size // reduction),
        ffn_hidden_size=draw.randint(8, source.ffn_hidden_size),
        num_attention_heads=fewer * per_group,
        num_query_groups=fewer,
    )
    return source, target


@pytest.mark.parametrize("seed", range(14))
def test_sliced_equals_masked(seed):
    source, target = random_models(seed)
    selection = toy.random_selection(source, target, seed)
    target = of_layers(target, source, selection.layers.tolist())
    full = toy.model(source, seed)
    keep = np.random.default_rng(seed).permutation(source.vocab_size)  # also in another order
    small = toy.sliced(full, source, target, selection, Rows.of([[i] for i in keep]))

    ids = torch.randint(0, source.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
    before = toy.logits(full, torch.from_numpy(keep)[ids])
    drop_bottleneck(full, selection)
    kept = {"hidden_kept": target.hidden_size, "groups_kept": target.query_groups}
    with attached(full, Masks.of(selection, source), **kept):
        masked = toy.logits(full, torch.from_numpy(keep)[ids])
    torch.testing.assert_close(toy.logits(small, ids), masked[..., keep], atol=1e-5, rtol=1e-5)
    if source != target:
        assert (before - masked).abs().max() > 1e-3, "the selection must have mattered"


def test_masks_leave_the_model_as_it_was():
    source = toy.config()
    full, ids = toy.model(source), torch.arange(12)[None]
    before = toy.logits(full, ids)
    with attached(full, Masks.of(toy.random_selection(source, source, 0), source), hidden_kept=7):
        assert not torch.equal(toy.logits(full, ids), before)
    assert torch.equal(toy.logits(full, ids), before)


@pytest.mark.parametrize("order, shortcuts", [(0, 0), (1, 0), (2, 1), (0, 1)])
def test_new_pi_modules_start_as_the_identity(order, shortcuts):
    """Units that the target has in addition change no logit: the extended model equals the source."""
    source = toy.config(series_activation_order=order, augmented_shortcuts=shortcuts)
    target = toy.config(series_activation_order=3, augmented_shortcuts=2)
    full, bigger = toy.model(source), toy.model(target)
    have = toy.tensors(full)
    pi = ("series_activation.", "augmented_shortcut.")
    values = {
        key: grown(key, have.get(key), value.shape, lambda size: torch.ones(size))
        if any(name in key for name in pi)
        else have[key]
        for key, value in toy.tensors(bigger).items()
    }
    toy.load(bigger, values)
    ids = torch.arange(20)[None] * 3
    torch.testing.assert_close(toy.logits(bigger, ids), toy.logits(full, ids), atol=1e-6, rtol=1e-6)


def test_a_choice_is_ascending():
    empty = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="hidden must be ascending"):
        Selection(torch.tensor([0]), torch.tensor([3, 3]), empty, empty, empty)


@torch.no_grad()
def drop_bottleneck(model: nn.Module, selection: Selection) -> None:
    """Zero the ``up`` weights of the shortcut units that ``selection`` drops, in place."""
    if not selection.bottleneck.size(1):
        return
    for row, index in enumerate(selection.layers.tolist()):
        up = model.decoder.layers[index].self_attention.augmented_shortcut.up
        dropped = torch.ones(up.size(1), dtype=torch.bool, device=up.device)
        dropped[selection.bottleneck[row]] = False
        up[:, dropped] = 0

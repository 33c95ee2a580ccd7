"""The table of names and layouts: its two directions are inverses."""

import random

import pytest
import torch

from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_config import write_config
from megatron_ext.interchange.mapping import ARCHITECTURES, architecture_of
from tests.unit.interchange.toys import pi_model, random_entry


@pytest.mark.parametrize("seed", range(40))
def test_splitting_and_joining_are_inverses(seed):
    model, entry = random_entry(random.Random(seed))
    ours = torch.randn(model.without_padding.parameters()[entry.ours])
    theirs = entry.layout.split(ours, model)
    assert [t.size() for t in theirs] == entry.layout.sizes(ours.size(), model)
    assert len(theirs) == len(entry.theirs)
    assert torch.equal(entry.layout.join(theirs, model), ours)


def test_queries_keys_and_values_lie_by_group():
    model = pi_model(num_attention_heads=4, num_query_groups=2, kv_channels=2, hidden_size=8)
    entry = next(e for e in ARCHITECTURES["llama"].entries_of(_plain(model)) if "qkv.weight" in e.ours)
    q, k, v = (
        torch.tensor(rows).repeat_interleave(2)[:, None].expand(-1, 8)
        for rows in ([0, 1, 2, 3], [10, 11], [20, 21])
    )
    assert entry.layout.join([q, k, v], model)[::2, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_every_tensor_has_one_place():
    for model in (
        pi_model(),
        pi_model(tied=True, add_qkv_bias=True),
        _plain(pi_model()),
    ):
        names = [name for entry in architecture_of(model).entries_of(model) for name in entry.theirs]
        assert len(names) == len(set(names))
        assert [e.ours for e in architecture_of(model).entries_of(model)] == list(model.parameters())


@pytest.mark.parametrize("kind", ["llama", "mistral", "internlm2"])
def test_no_place_for_biases(kind):
    with pytest.raises(InterchangeError, match="no place for decoder.layers.0.*linear_qkv.bias"):
        list(ARCHITECTURES[kind].entries_of(_plain(pi_model(add_qkv_bias=True))))


def test_qwen2_needs_its_biases():
    with pytest.raises(InterchangeError, match="has biases that this model lacks"):
        write_config(_plain(pi_model()), torch.float32, "qwen2")


def _plain(model):
    from dataclasses import replace

    return replace(model, series_activation_order=0, augmented_shortcuts=0)

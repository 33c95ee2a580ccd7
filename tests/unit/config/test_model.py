"""Values derived from a model's configuration, and invalid configurations."""

import dataclasses

import pytest

from megatron_ext.config.model import ModelConfig, NoSuchModel
from megatron_ext.config.presets import preset

TINY = preset("tiny")


def test_padding_of_the_vocabulary():
    model = dataclasses.replace(TINY, softmax_vocab_size=300, padded_vocab_size=384)
    assert (model.vocab_size, model.vocab_rows) == (300, 384)
    embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
    padded, bare = model.parameters(), model.without_padding.parameters()
    assert (padded[embedding], padded[head]) == ((384, 128), (384, 128))
    assert bare == padded | {embedding: (300, 128), head: (300, 128)} and list(bare) == list(padded)
    assert model.num_parameters - model.without_padding.num_parameters == 2 * 84 * 128


@pytest.mark.parametrize("name", ["softmax_vocab_size", "padded_vocab_size"])
def test_a_vocabulary_that_is_said_once(name):
    sizes = {"softmax_vocab_size": None, "padded_vocab_size": None} | {name: 300}
    model = dataclasses.replace(TINY, **sizes)
    assert model.vocab_size == model.vocab_rows == model.without_padding.vocab_rows == 300


def test_heads_share_keys_and_values_by_group():
    assert TINY.heads_per_group == 1
    grouped = dataclasses.replace(TINY, group_query_attention=True, num_query_groups=2)
    assert (grouped.query_groups, grouped.heads_per_group, grouped.qkv_width) == (2, 2, 8 * 32)


@pytest.mark.parametrize("name", ["hidden_size", "num_layers", "kv_channels", "padded_vocab_size"])
def test_sizes_beyond_every_model(name):
    with pytest.raises(NoSuchModel, match=f"--{name.replace('_', '-')} {1 << 31}: no model is as large"):
        dataclasses.replace(TINY, **{name: 1 << 31})
    assert dataclasses.replace(TINY, rotary_base=1 << 31).rotary_base == 1 << 31  # no size


def test_values_of_other_types():
    with pytest.raises(NoSuchModel) as error:
        ModelConfig(**vars(TINY) | {"num_layers": "8", "swiglu": 1, "normalization": "None"})
    assert len(error.value.problems) == 3

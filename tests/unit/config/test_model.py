"""Values derived from a model's configuration, and invalid configurations."""

import argparse
import dataclasses

import pytest

from megatron_ext.config.layer_pattern import pattern
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", 4),
        ("[0,0,0,1]", (0, 0, 0, 1)),
        ("([0]*3+[1])*2", (0, 0, 0, 1, 0, 0, 0, 1)),
        ("[1]+[0]*2", (1, 0, 0)),
    ],
)
def test_patterns_of_layers(text, expected):
    assert pattern(text) == expected


@pytest.mark.parametrize("text", ["", "x", "[0", "[0]*[1]", "[[0]]", "[0]*99999", "2*3", "__import__('os')"])
def test_patterns_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number, nor a list such as"):
        pattern(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_freq": (0, 1)}, "--no-rope-freq has 2 entries, but there are 8 layers"),
        ({"no_rope_freq": 0}, "--no-rope-freq 0: must be at least 1"),
        ({"no_rope_freq": (2,) * 8}, "its entries are 0 and 1"),
        ({"window_size": (9,)}, "--window-size 9: give LEFT,0"),
        ({"window_size": (-1, 0)}, "--window-size -1,0: give LEFT,0"),
        ({"window_size": (9, 0), "window_attn_skip_freq": (1,)}, "--window-attn-skip-freq has 1 entries"),
        ({"geglu": True}, "--swiglu and --geglu exclude each other"),
        ({"softmax_scale": 0.0}, "--softmax-scale 0.0: must be above 0"),
        ({"norm_placement": "post"}, "--norm-placement 'post': must be one of input, output, both"),
        (
            {"qk_layernorm": True, "qk_layernorm_across_heads": True, "normalization": "LayerNorm"},
            "--qk-layernorm-across-heads is an RMSNorm",
        ),
    ],
)
def test_layers_of_no_model(changes, message):
    with pytest.raises(NoSuchModel, match=message):
        dataclasses.replace(TINY, **changes)


def test_which_layers_have_what():
    """Megatron-LM's numbers name the last of each group of layers, its lists every layer."""
    model = dataclasses.replace(TINY, no_rope_freq=4, window_size=(9, 0), window_attn_skip_freq=3)
    assert model.unrotated == (0, 0, 0, 1, 0, 0, 0, 1)
    assert model.windowed == (1, 1, 0, 1, 1, 0, 1, 1)
    assert dataclasses.replace(model, window_attn_skip_freq=None).windowed == (1,) * 8
    assert TINY.unrotated == TINY.windowed == (0,) * 8

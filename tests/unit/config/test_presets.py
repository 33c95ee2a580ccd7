"""The presets have the sizes that the papers state."""

import pytest
import torch

from megatron_ext.config.presets import PRESETS, preset, preset_values

#: Parameters that Hugging Face counts in the folders of other makers' models.
OTHERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "olmo2-1b": 1_484_916_736,
    "openpangu-1b": None,  # whose folder has biases besides
}


def test_paper_shapes():
    shapes = {
        name: (p.num_layers, p.hidden_size, p.num_attention_heads, p.softmax_vocab_size)
        for name, p in PRESETS.items()
    }
    assert shapes["pangu-pi-1b"] == (12, 2048, 16, 100883)
    assert shapes["pangu-pi-7b"] == (29, 4096, 32, 100883)
    assert shapes["pangu-pi-1b-pro"] == (21, 1792, 14, 48000)
    assert shapes["pangu-pi-1.5b-pro"] == (22, 2048, 16, 48000)


@pytest.mark.parametrize("name", ["1b", "7b", "1b-pro", "1.5b-pro"])
def test_short_names_and_heads_of_128(name):
    shape = preset(name)
    assert shape is PRESETS[f"pangu-pi-{name}"]
    assert shape.hidden_size == 128 * shape.num_attention_heads
    assert shape.ffn_hidden_size % 128 == 0


def test_unknown_preset_lists_the_known():
    with pytest.raises(LookupError, match="pangu-pi-1b-pro"):
        preset("2b")


@pytest.mark.parametrize("name", OTHERS)
def test_other_makers_models_are_as_large_as_transformers_builds_them(name):
    transformers = pytest.importorskip("transformers")
    from megatron_ext.interchange.hf_config import write_config

    config = write_config(preset(name), torch.bfloat16)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert preset(name).without_padding.num_parameters == theirs.num_parameters()
    assert theirs.num_parameters() == OTHERS[name] or OTHERS[name] is None


def test_a_preset_says_nothing_that_follows_from_what_is_typed():
    """A typed --hidden-size changes the width of the heads, unless the preset sets it."""
    assert "kv_channels" not in preset_values("tiny")
    assert preset_values("qwen3-0.6b")["kv_channels"] == 128
    assert not any(name.endswith("vocab_size") for name in preset_values("1b-pro"))

"""The presets have the sizes that the papers state."""

import pytest

from megatron_ext.config.presets import PRESETS, preset


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

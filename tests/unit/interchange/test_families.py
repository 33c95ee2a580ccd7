"""What the config.json of each architecture says: read as transformers reads it, or refused by name."""

import dataclasses
import json

import pytest
import torch

from megatron_ext.config.presets import preset
from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_config import read_model, write_config
from megatron_ext.interchange.mapping import ARCHITECTURES, architecture_of

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def config(maker: str, **changes) -> dict:
    return SIZES | {"model_type": maker} | changes


def test_the_sizes_of_their_published_configurations():
    """As they stand in the folders on Hugging Face, but for what no architecture here reads."""
    smollm3 = {
        "model_type": "smollm3", "num_hidden_layers": 36, "hidden_size": 2048, "intermediate_size": 11008,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "rope_theta": 5000000.0,
        "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4,
        "layer_types": ["full_attention"] * 36, "attention_bias": False, "mlp_bias": False,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 65536,
        "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "hidden_act": "silu",
    }  # fmt: skip
    model = read_model(smollm3)
    assert model.tied and model.unrotated == (0, 0, 0, 1) * 9 and model.rotary_base == 5000000
    assert dataclasses.replace(model, no_rope_freq=4).effective() == model.effective()
    phi4 = {
        "model_type": "phi3", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17920,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "rope_theta": 250000,
        "rope_scaling": None, "sliding_window": None, "max_position_embeddings": 16384, "embd_pdrop": 0.0,
        "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "attention_bias": False,
    }  # fmt: skip
    model = read_model(phi4)
    assert (model.rotary_percent, model.window_size, model.rotary_base) == (1.0, None, 250000)
    gemma3 = {
        "model_type": "gemma3_text", "num_hidden_layers": 26, "hidden_size": 1152, "intermediate_size": 6912,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 32768,
    }  # fmt: skip
    model = read_model(gemma3)
    assert (
        model.window_size == (511, 0) and sum(model.windowed) == 22 and model.windowed[:6] == (1,) * 5 + (0,)
    )
    assert (model.rotary_base, model.window_rotary_base) == (1000000, 10000)
    assert model.without_padding.num_parameters == 999_885_952  # what Hugging Face counts in gemma-3-1b


@pytest.mark.parametrize("maker", [name for name in ARCHITECTURES if name not in ("internlm2", "pangu_pi")])
def test_settings_left_out_are_those_of_transformers(maker):
    theirs = toys.transformers.AutoConfig.for_model(maker, **SIZES)
    said = theirs.to_dict() | {"rope_theta": None}
    assert read_model(config(maker)) == read_model(said)


@pytest.mark.parametrize(
    ("maker", "changes", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias is not supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types .*sliding_attention"),
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' are not supported"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers .1, 0. .*one for each of 4 layers"),
        ("smollm3", {"no_rope_layers": "1110"}, "no_rope_layers 1110 is not a list"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, not an integer above 0"),
        ("olmo2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "type 'linear'"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "type 'longrope'"),
        ("phi3", {"rope_scaling": {"rope_type": "su"}}, "type 'su' are not supported"),
        ("phi3", {"partial_rotary_factor": 0.2}, "0.2 is not a share of the head's 16 channels, in pairs"),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}},
            "said twice and differs: 0.5 and 0.75",
        ),
        ("phi3", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0, not a number above 0"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling is '8', not a number"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "type 'linear'"),
        ("gemma3_text", {"rope_local_base_freq": 0.5}, "rope_theta 0.5 is not supported for sliding"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": 5}}, "rope_parameters .* has no object"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, "layer_types .*chunked_attention"),
        ("gemma3_text", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is None"),
        ("pangu_pi", {"norm_placement": "post"}, "norm_placement 'post' is not input, output or both"),
        ("pangu_pi", {"qk_layernorm": 1}, "qk_layernorm is 1, not true or false"),
        ("pangu_pi", {"window_size": 9}, "window_size needs windowed_layers"),
    ],
)  # fmt: skip
def test_settings_that_no_model_has(maker, changes, message):
    with pytest.raises(InterchangeError, match=message):
        read_model(config(maker, **changes))


@pytest.mark.parametrize("maker", ["olmo3", "PanguEmbedded", "gemma3"])
def test_a_llama_under_another_name_is_refused_with_what_to_do(maker):
    """A folder that claims Llama's class may still be computed otherwise: its owner has to say so."""
    with pytest.raises(
        InterchangeError, match=f"unknown architecture '{maker}'; known are llama, .*gemma3_text"
    ):
        read_model(config(maker))
    hint = "LlamaForCausalLM: if it computes as one, set model_type to 'llama' in config.json"
    with pytest.raises(InterchangeError, match=hint):
        read_model(config(maker, architectures=["LlamaForCausalLM"]))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("qwen3-0.6b", "qwen3"), ("olmo2-1b", "olmo2"), ("smollm2-135m", "llama"), ("llama-3.2-1b", "llama")],
)
def test_the_plainest_architecture_is_written(name, architecture):
    model = preset(name)
    assert architecture_of(model).model_type == architecture
    config = json.loads(json.dumps(write_config(model, torch.bfloat16)))
    assert read_model(config).effective() == model.effective()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"no_rope_freq": 2}, "LlamaForCausalLM: it has no --no-rope-freq"),
        ("qwen3", {}, "Qwen3ForCausalLM: it always has --qk-layernorm True"),
        ("olmo2", {"qk_layernorm": True, "qk_layernorm_across_heads": True}, "always has --norm-placement"),
        ("granite", {"rotary_percent": 0.5}, "GraniteForCausalLM: it has no --rotary-percent"),
        ("phi3", {"use_rope_scaling": True}, "Phi3ForCausalLM: it has no --use-rope-scaling"),
    ],
)  # fmt: skip
def test_an_architecture_that_lacks_what_the_model_has(architecture, changes, message):
    model = toys.pi_model(series_activation_order=0, augmented_shortcuts=0, **changes)
    with pytest.raises(InterchangeError, match=message):
        write_config(model, torch.float32, architecture)

"""Model presets: the models of the two papers, published models, and two small ones for a laptop.

Layers, hidden sizes, vocabularies and the head width of 128 are stated in arXiv 2402.02791 and
2312.17276. FFN widths are our reading, rounded to 128 channels so that TP 2/4/8 and FP8 shapes fit:
pangu-pi-7b 11,008; pangu-pi-1b so that embedding and head are 38.19 % of the model; the Pro models
so that the totals are 1.00e9 and 1.50e9 (third-party notes give 2.77 x hidden for 1b-pro, that is
4,964; 4,864 is the multiple of 128 that keeps the total within 1 % of 1e9).

The models of other makers are those that their ``config.json`` describes, at the length that they were
pretrained at; rotary positions have no end.
"""

from typing import Any

from megatron_ext.config.data import padded
from megatron_ext.config.model import ModelConfig

#: A Llama-style decoder.
_LLAMA_STYLE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
#: Both PanGu-pi modules.
_PI: dict[str, Any] = {
    "series_activation_order": 2,
    "augmented_shortcuts": 1,
    "augmented_shortcut_reduction": 32,
}
_TIED = {"untie_embeddings_and_output_weights": False}
_QWEN3: dict[str, Any] = _TIED | {
    "kv_channels": 128,
    "qk_layernorm": True,
    "rotary_base": 1000000,
    "layernorm_epsilon": 1e-6,
}
_OLMO2: dict[str, Any] = {
    "qk_layernorm": True,
    "qk_layernorm_across_heads": True,
    "norm_placement": "output",
    "rotary_base": 500000,
    "layernorm_epsilon": 1e-6,
}
_LLAMA3: dict[str, Any] = _TIED | {
    "rotary_base": 500000,
    "use_rope_scaling": True,
    "rope_scaling_factor": 32.0,
}
#: Further training settings.
_TRAINED_WITH: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "init_method_std": 0.02}


def _shape(
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    vocabulary: int,
    sequence: int,
    groups: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """``vocabulary`` is the size the model was designed for; the tokenizer determines the actual size."""
    grouped = {} if groups is None else {"group_query_attention": True, "num_query_groups": groups}
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": ffn,
        "max_position_embeddings": sequence,
        "softmax_vocab_size": vocabulary,
        "padded_vocab_size": padded(vocabulary),
    }
    return _LLAMA_STYLE | sizes | grouped | more


#: Name -> fields of ModelConfig.
_VALUES: dict[str, dict[str, Any]] = {
    "pangu-pi-1b": _shape(12, 2048, 16, 6272, 100883, 2048, **_PI),  # arXiv 2312.17276
    "pangu-pi-7b": _shape(29, 4096, 32, 11008, 100883, 2048, **_PI),  # arXiv 2312.17276
    "pangu-pi-1b-pro": _shape(21, 1792, 14, 4864, 48000, 2048, **_PI),  # arXiv 2402.02791
    "pangu-pi-1.5b-pro": _shape(22, 2048, 16, 6912, 48000, 2048, **_PI),  # arXiv 2402.02791
    "tiny": _shape(8, 128, 4, 384, 4096, 256, **_PI),  # this project, about 3M parameters
    "small": _shape(10, 384, 6, 1024, 8192, 512, **_PI),  # this project, about 25M parameters
    # huggingface.co/Qwen/Qwen3-0.6B-Base and Qwen3-1.7B-Base; first stage at 4,096 tokens (arXiv 2505.09388)
    "qwen3-0.6b": _shape(28, 1024, 16, 3072, 151936, 4096, groups=8, **_QWEN3),
    "qwen3-1.7b": _shape(28, 2048, 16, 6144, 151936, 4096, groups=8, **_QWEN3),
    # huggingface.co/meta-llama/Llama-3.2-1B; 8,192 tokens before the scaling (arXiv 2407.21783)
    "llama-3.2-1b": _shape(16, 2048, 32, 8192, 128256, 8192, groups=8, **_LLAMA3),
    # huggingface.co/HuggingFaceTB/SmolLM2-135M, -360M and -1.7B; 2,048 tokens (arXiv 2502.02737)
    "smollm2-135m": _shape(30, 576, 9, 1536, 49152, 2048, groups=3, **_TIED, rotary_base=100000),
    "smollm2-360m": _shape(32, 960, 15, 2560, 49152, 2048, groups=5, **_TIED, rotary_base=100000),
    "smollm2-1.7b": _shape(24, 2048, 32, 8192, 49152, 2048, **_TIED, rotary_base=130000),
    # huggingface.co/allenai/OLMo-2-0425-1B; 4,096 tokens (arXiv 2501.00656)
    "olmo2-1b": _shape(16, 2048, 16, 8192, 100352, 4096, **_OLMO2),
    # openPangu-Embedded-1B, without its biases of queries, keys, values and output
    # (ai.gitcode.com/ascend-tribe/openpangu-embedded-1b-model); 4,096 of its 32,768 tokens
    "openpangu-1b": _shape(26, 1536, 12, 6144, 153376, 4096, groups=6, **_TIED, rotary_base=4000000),
}
PRESETS: dict[str, ModelConfig] = {name: ModelConfig(**values) for name, values in _VALUES.items()}
_SHORT = {name.removeprefix("pangu-pi-"): name for name in list(PRESETS) if name.startswith("pangu-pi-")}
PRESETS |= {short: PRESETS[name] for short, name in _SHORT.items()}


def preset(name: str) -> ModelConfig:
    """The model of that name.

    Raises:
        LookupError: there is none; the message lists the presets.
    """
    if name not in PRESETS:
        raise LookupError(f"--model-preset {name}: there is no such preset; choose {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_values(name: str) -> dict[str, Any]:
    """Name -> value of every flag that a preset sets; raises LookupError as :func:`preset`.

    The sequence length is the preset's number of positions.
    """
    model = preset(name)
    values = _VALUES[_SHORT.get(name, name)]
    own = {key: value for key, value in values.items() if not key.endswith("vocab_size")}
    return own | {"seq_length": model.max_position_embeddings} | _TRAINED_WITH

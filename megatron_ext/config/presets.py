"""Model presets: the models of the two papers, and two small ones for a laptop.

Layers, hidden sizes, vocabularies and the head width of 128 are stated in arXiv 2402.02791 and
2312.17276. FFN widths are our reading, rounded to 128 channels so that TP 2/4/8 and FP8 shapes fit:
pangu-pi-7b 11,008; pangu-pi-1b so that embedding and head are 38.19 % of the model; the Pro models
so that the totals are 1.00e9 and 1.50e9 (third-party notes give 2.77 x hidden for 1b-pro, that is
4,964; 4,864 is the multiple of 128 that keeps the total within 1 % of 1e9).
"""

from typing import Any

from megatron_ext.config.data import padded
from megatron_ext.config.model import ModelConfig

#: Common to all presets: a Llama-style decoder with both PanGu-pi modules.
_LLAMA_STYLE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "series_activation_order": 2,
    "augmented_shortcuts": 1,
    "augmented_shortcut_reduction": 32,
}
#: Further training settings of the papers' models.
_TRAINED_WITH: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "init_method_std": 0.02}
_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")


def _model(layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, sequence: int) -> ModelConfig:
    """``vocabulary`` is the size the model was designed for; the tokenizer determines the actual size."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        max_position_embeddings=sequence,
        softmax_vocab_size=vocabulary,
        padded_vocab_size=padded(vocabulary),
        **_LLAMA_STYLE,
    )


PRESETS: dict[str, ModelConfig] = {
    "pangu-pi-1b": _model(12, 2048, 16, 6272, 100883, 2048),  # arXiv 2312.17276
    "pangu-pi-7b": _model(29, 4096, 32, 11008, 100883, 2048),  # arXiv 2312.17276
    "pangu-pi-1b-pro": _model(21, 1792, 14, 4864, 48000, 2048),  # arXiv 2402.02791
    "pangu-pi-1.5b-pro": _model(22, 2048, 16, 6912, 48000, 2048),  # arXiv 2402.02791
    "tiny": _model(8, 128, 4, 384, 4096, 256),  # this project, about 3M parameters
    "small": _model(10, 384, 6, 1024, 8192, 512),  # this project, about 25M parameters
}
PRESETS |= {
    name.removeprefix("pangu-pi-"): PRESETS[name] for name in list(PRESETS) if name.startswith("pangu-pi-")
}


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
    sizes = {size: getattr(model, size) for size in _SIZES}
    return sizes | {"seq_length": model.max_position_embeddings} | _LLAMA_STYLE | _TRAINED_WITH

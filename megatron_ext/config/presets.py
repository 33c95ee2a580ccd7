"""Model shapes by name: the two papers' models, and two small ones for a laptop.

Layers, hidden sizes, vocabularies and the head width of 128 are stated in arXiv 2402.02791 and
2312.17276. FFN widths are our reading, rounded to 128 channels so that TP 2/4/8 and FP8 shapes fit:
pangu-pi-7b 11,008; pangu-pi-1b so that embedding and head are 38.19 % of the model; the Pro models
so that the totals are 1.00e9 and 1.50e9 (third-party notes give 2.77 x hidden for 1b-pro, that is
4,964; 4,864 is the multiple of 128 that keeps the total within 1 % of 1e9).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model shape and what it was published with."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    """Size of the vocabulary that the model was designed for; the tokenizer decides the real one."""
    sequence: int
    source: str

    def flags(self) -> dict[str, Any]:
        """Destination -> value of every flag that the preset sets."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "ffn_hidden_size": self.ffn,
            "seq_length": self.sequence,
            "max_position_embeddings": self.sequence,
        } | LLAMA_STYLE


#: What all presets share: a Llama-style decoder with both PanGu-pi modules.
LLAMA_STYLE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "series_activation_order": 2,
    "augmented_shortcuts": 1,
    "augmented_shortcut_reduction": 32,
}

PRESETS: dict[str, Preset] = {
    "pangu-pi-1b": Preset(12, 2048, 16, 6272, 100883, 2048, "arXiv 2312.17276"),
    "pangu-pi-7b": Preset(29, 4096, 32, 11008, 100883, 2048, "arXiv 2312.17276"),
    "pangu-pi-1b-pro": Preset(21, 1792, 14, 4864, 48000, 2048, "arXiv 2402.02791"),
    "pangu-pi-1.5b-pro": Preset(22, 2048, 16, 6912, 48000, 2048, "arXiv 2402.02791"),
    "tiny": Preset(8, 128, 4, 384, 4096, 256, "this project, about 3M parameters"),
    "small": Preset(10, 384, 6, 1024, 8192, 512, "this project, about 25M parameters"),
}
PRESETS |= {
    name.removeprefix("pangu-pi-"): PRESETS[name] for name in list(PRESETS) if name.startswith("pangu-pi-")
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        LookupError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise LookupError(f"--model-preset {name}: there is no such preset; choose {', '.join(PRESETS)}")
    return PRESETS[name]

"""The README of an exported folder."""

from __future__ import annotations

from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.hf_tokenizer import SpecialIds

_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
---

# {class_name}, {billions} parameters

{kind} {origin}

    from transformers import AutoModelForCausalLM{also}

    model = AutoModelForCausalLM.from_pretrained("PATH"{trust}){tokenizer}

| | |
|---|---|
"""
_USE_TOKENIZER = """
    tokenizer = AutoTokenizer.from_pretrained("PATH")
    inputs = tokenizer("The import statement", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""
_PLAIN = "A plain decoder of Llama's kind: no code comes with it."
_PI = (
    "PanGu-π ([arXiv 2312.17276](https://arxiv.org/abs/2312.17276), "
    "[arXiv 2402.02791](https://arxiv.org/abs/2402.02791)): a Llama-like decoder with a series activation in "
    "the MLP and an augmented shortcut beside the attention. Its code is in this folder "
    "(`modeling_pangu_pi.py`), so it loads with `trust_remote_code=True`."
)
_FOOTER = """
What it was trained on, and what it is fit for, is for its makers to say here. `checksums.json` holds size and
SHA-256 of the files that decide what the model says.
"""


def model_card(model: ModelConfig, config: dict[str, Any], special: SpecialIds, origin: str) -> str:
    """Markdown: what the model is, how to load it, its shape."""
    pi = config["model_type"] == "pangu_pi"
    head = _HEADER.format(
        model_type=config["model_type"],
        class_name=config["architectures"][0],
        billions=_readable(model.without_padding.num_parameters),
        kind=_PI if pi else _PLAIN,
        origin=f"Converted from {origin}." if origin else "",
        also=", AutoTokenizer" if special.has_tokenizer else "",
        trust=", trust_remote_code=True" if pi else "",
        tokenizer=_USE_TOKENIZER if special.has_tokenizer else "",
    )
    rows = [f"| {name} | {value} |\n" for name, value in _facts(model, config).items()]
    return head + "".join(rows) + _FOOTER


def _facts(model: ModelConfig, config: dict[str, Any]) -> dict[str, object]:
    facts = {
        "layers": model.num_layers,
        "hidden channels": model.hidden_size,
        "FFN channels": model.ffn_hidden_size,
        "query heads, key and value heads": f"{model.num_attention_heads}, {model.query_groups}",
        "channels a head": model.kv_channels,
        "vocabulary": f"{model.vocab_size}{', tied' if model.tied else ''}",
        "positions": model.max_position_embeddings,
        "numbers": config["torch_dtype"],
    }
    if model.series_activation_order:
        facts["terms of the series activation"] = model.series_activation_order
    if model.augmented_shortcuts:
        facts["augmented shortcuts, reduction"] = (
            f"{model.augmented_shortcuts}, {model.augmented_shortcut_reduction}"
        )
    return facts


def _readable(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)

"""Toy models of other makers, written as their folders; and one of ours."""

import dataclasses
import json
import random
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.llama import llama_like
from megatron_ext.interchange.mapping import ARCHITECTURES, Entry
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.interchange.tokenizer_files import TokenizerFiles

VOCABULARY, POSITIONS = 300, 32
#: name -> (maker, query groups, tied)
TOYS = {
    "llama-gqa": ("llama", 2, False),
    "llama-mha-tied": ("llama", 4, True),
    "qwen2": ("qwen2", 2, True),
    "mistral": ("mistral", 2, False),
    "internlm2": ("internlm2", 2, False),
    "qwen3": ("qwen3", 2, False),
    "qwen3-tied": ("qwen3", 4, True),
    "smollm3": ("smollm3", 2, True),
    "olmo2": ("olmo2", 2, False),
    "phi3": ("phi3", 2, False),
    "granite": ("granite", 2, True),
    "gemma3": ("gemma3_text", 2, True),
}
#: maker -> what sets its toys apart, in its own words.
OWN = {
    "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": None},
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        "sliding_window": 9,
        "pad_token_id": None,
    },
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}


def model(maker: str, groups: int, tied: bool, **changes):
    """A model of transformers' with random weights, biases and norms; InternLM2 computes as Llama does.

    ``changes`` are settings of its configuration.
    """
    maker = "llama" if maker == "internlm2" else maker
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    settings |= OWN.get(maker, {})
    config = transformers.AutoConfig.for_model(maker, **settings | changes)
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            mean = 1.0 if "norm" in name and maker != "gemma3_text" else 0.0  # whose gains are 1 + weight
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def folder(path: Path, maker: str, groups: int, tied: bool, shards: bool = False, **changes) -> Path:
    """The model's folder, in one file or in several."""
    built = model(maker, groups, tied, **changes)
    built.save_pretrained(path, max_shard_size="100KB" if shards else "1GB")
    if maker == "internlm2":
        _rename_to_internlm2(path)
    return path


def _rename_to_internlm2(path: Path) -> None:
    """Llama's folder under InternLM2's names, its queries, keys and values fused by hand."""
    tensors = load_file(path / "model.safetensors")
    renamed = {
        "model.tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
    }
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in (f"model.layers.{i}." for i in range(2)):
        renamed |= {f"{layer}{to}.weight": tensors[f"{layer}{of}.weight"] for to, of in names.items()}
        q, k, v = (tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
        rows = []
        for group in range(2):  # of two query heads of 16 channels each, one key and one value head
            rows += [q[32 * group : 32 * group + 32], k[16 * group : 16 * group + 16]]
            rows += [v[16 * group : 16 * group + 16]]
        renamed[f"{layer}attention.wqkv.weight"] = torch.cat(rows)
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    del config["attention_bias"], config["mlp_bias"]
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"]}
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (path / "config.json").write_text(json.dumps(config))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by safetensors itself."""
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def pi_model(tied: bool = False, **changes) -> ModelConfig:
    """A small model with both pi modules, several terms and shortcuts."""
    values = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=VOCABULARY,
        padded_vocab_size=384,
        untie_embeddings_and_output_weights=not tied,
        max_position_embeddings=64,
        series_activation_order=3,
        augmented_shortcuts=2,
        augmented_shortcut_reduction=8,
    )
    return llama_like(**values | changes)


def random_tensors(model: ModelConfig, seed: int = 3):
    """name -> random tensor of the size that ``model`` says."""
    sizes, generator = model.without_padding.parameters(), torch.Generator().manual_seed(seed)
    made = {
        name: (1.0 if "norm" in name else 0.0) + 0.1 * torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }
    return made.__getitem__


def checkpoint(
    path: Path,
    model: ModelConfig,
    tokenizer: TokenizerFiles | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A checkpoint of ours with random weights."""
    write_checkpoint(path, model, dtype, random_tensors(model), tokenizer=tokenizer)
    return path


def same(one: Path, other: Path) -> bool:
    """Whether two sources hold the same model, bit for bit."""
    a, b = open_source(one), open_source(other)
    alike = (a.model, a.dtype) == (b.model, b.dtype)
    return alike and all(torch.equal(a.get(key), b.get(key)) for key in a.keys())


def random_entry(rng: random.Random) -> tuple[ModelConfig, Entry]:
    """A model with random heads and groups, and one line of a random architecture's table."""
    groups, per_group, width = rng.randint(1, 5), rng.randint(1, 4), 2 * rng.randint(1, 4)
    model = pi_model(
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=width,
        hidden_size=8 * rng.randint(1, 6),
        ffn_hidden_size=rng.randint(1, 40),
        add_qkv_bias=True,
    )
    plain = dataclasses.replace(model, series_activation_order=0, augmented_shortcuts=0, add_qkv_bias=False)
    kind, model = rng.choice((("pangu_pi", model), ("phi3", plain)))
    return model, rng.choice(list(ARCHITECTURES[kind].entries_of(model)))

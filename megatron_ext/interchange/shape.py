"""What a Llama-like model, with or without the PanGu-pi modules, is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from megatron_ext.config import model_function
from megatron_ext.config.model_function import Saved
from megatron_ext.interchange.errors import InterchangeError

#: Embedding rows of a checkpoint of ours are a multiple of this (--make-vocab-size-divisible-by).
VOCABULARY_UNIT = 128


def _is_real(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


#: What the fields may hold: files of other makers say anything. Sizes stay countable when multiplied.
_KINDS = {
    "int": ("a size", lambda value: type(value) is int and 0 <= value < 1 << 31),
    "bool": ("true or false", lambda value: type(value) is bool),
    "float": ("a number", _is_real),
    "float | None": ("a number", lambda value: value is None or _is_real(value)),
    "torch.dtype": ("a number format", lambda value: isinstance(value, torch.dtype)),
}


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides a model's tensors and its function, apart from their values.

    Names are Megatron-LM's. ``vocab_size`` is without padding, ``padded_vocab_size`` the rows of the
    embedding in a checkpoint; ``dtype`` is that of the stored tensors. ``rope_scaling_factor`` is None
    without Llama 3's rotary scaling.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    norm_epsilon: float = 1e-5
    rotary_base: int = 10000
    rope_scaling_factor: float | None = None
    max_position_embeddings: int = 2048
    series_activation_order: int = 0
    augmented_shortcuts: int = 0
    augmented_shortcut_reduction: int = 32
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} is {value!r}, not {kind}"
            for field in fields(self)
            for kind, fits in [_KINDS[str(field.type)]]
            if not fits(value := getattr(self, field.name))
        ]
        problems = problems or [
            f"{name} is {value}, it must be at least 1"
            for name, value in vars(self).items()
            if type(value) is int
            and value < 1
            and name not in ("series_activation_order", "augmented_shortcuts")
        ]
        if not problems and self.num_attention_heads % self.num_query_groups:
            problems.append(
                f"{self.num_attention_heads} heads do not divide into {self.num_query_groups} groups"
            )
        if not problems and self.augmented_shortcuts and self.hidden_size % self.augmented_shortcut_reduction:
            problems.append(
                f"{self.hidden_size} hidden channels are no multiple of {self.augmented_shortcut_reduction}"
            )
        if self.padded_vocab_size < self.vocab_size:
            problems.append(f"{self.padded_vocab_size} rows are too few for {self.vocab_size} pieces")
        if problems:
            raise InterchangeError(f"no such model: {'; '.join(problems)}")

    @property
    def has_pi(self) -> bool:
        """Whether it has a PanGu-pi module, which no plain Llama has."""
        return bool(self.series_activation_order or self.augmented_shortcuts)

    @property
    def qkv_rows(self) -> int:
        """Rows of ``linear_qkv``: queries, keys and values of all groups."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def num_parameters(self) -> int:
        """Parameters, without the vocabulary's padding."""
        return sum(size.numel() for size in self.parameters().values())

    def parameters(self) -> dict[str, torch.Size]:
        """Name -> size of every tensor, unsharded and without padding, in the order of the forward pass."""
        embedding = torch.Size((self.vocab_size, self.hidden_size))
        sizes = {"embedding.word_embeddings.weight": embedding}
        for layer in range(self.num_layers):
            sizes |= {
                f"decoder.layers.{layer}.{name}": size for name, size in self.layer_parameters().items()
            }
        sizes["decoder.final_layernorm.weight"] = torch.Size((self.hidden_size,))
        return sizes if self.tied else sizes | {"output_layer.weight": embedding}

    def layer_parameters(self) -> dict[str, torch.Size]:
        """Name below ``decoder.layers.N.`` -> size, for one layer."""
        h, f = self.hidden_size, self.ffn_hidden_size
        sizes: dict[str, tuple[int, ...]] = {
            "self_attention.linear_qkv.layer_norm_weight": (h,),
            "self_attention.linear_qkv.weight": (self.qkv_rows, h),
        }
        if self.qkv_bias:
            sizes["self_attention.linear_qkv.bias"] = (self.qkv_rows,)
        sizes["self_attention.linear_proj.weight"] = (h, self.num_attention_heads * self.kv_channels)
        if self.augmented_shortcuts:
            inner = self.augmented_shortcuts * (h // self.augmented_shortcut_reduction)
            sizes["self_attention.augmented_shortcut.down"] = (inner, h)
            sizes["self_attention.augmented_shortcut.up"] = (h, inner)
        sizes["mlp.linear_fc1.layer_norm_weight"] = (h,)
        sizes["mlp.linear_fc1.weight"] = (2 * f, h)
        if self.series_activation_order:
            sizes["mlp.series_activation.scale"] = (self.series_activation_order, f)
            sizes["mlp.series_activation.bias"] = (self.series_activation_order, f)
        sizes["mlp.linear_fc2.weight"] = (h, f)
        return {name: torch.Size(size) for name, size in sizes.items()}

    @classmethod
    def from_saved(cls, saved: Saved, vocab_size: int, dtype: torch.dtype | None = None) -> ModelShape:
        """The shape that a checkpoint's arguments describe, ours or Megatron-LM's.

        Raises InterchangeError, with every reason, for a model that is not Llama-like.
        """
        if problems := list(_not_llama(saved)):
            raise InterchangeError(f"only Llama-like models can be exchanged: {'; '.join(problems)}")
        heads = saved["num_attention_heads"]
        grouped = saved.get("group_query_attention")
        return cls(
            num_layers=saved["num_layers"],
            hidden_size=saved["hidden_size"],
            ffn_hidden_size=saved["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=saved["num_query_groups"] if grouped else heads,
            kv_channels=saved["kv_channels"],
            vocab_size=vocab_size,
            padded_vocab_size=max(saved["padded_vocab_size"], vocab_size),
            tied=not saved["untie_embeddings_and_output_weights"],
            qkv_bias=bool(saved.get("add_qkv_bias")),
            # The flag is --norm-epsilon; the args of some versions have that name.
            norm_epsilon=saved.get("layernorm_epsilon") or saved["norm_epsilon"],
            rotary_base=saved["rotary_base"],
            rope_scaling_factor=saved["rope_scaling_factor"] if saved.get("use_rope_scaling") else None,
            max_position_embeddings=saved["max_position_embeddings"],
            series_activation_order=saved.get("series_activation_order", 0),
            augmented_shortcuts=saved.get("augmented_shortcuts", 0),
            augmented_shortcut_reduction=saved.get("augmented_shortcut_reduction", 32),
            dtype=dtype or saved["params_dtype"],
        )

    def flags(self) -> list[str]:
        """The command line of ``pretrain_pangu_pro.py`` that builds this model."""
        named: dict[str, object] = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--num-query-groups": self.num_query_groups,
            "--kv-channels": self.kv_channels,
            "--norm-epsilon": self.norm_epsilon,
            "--rotary-base": self.rotary_base,
            "--seq-length": self.max_position_embeddings,
            "--max-position-embeddings": self.max_position_embeddings,
            "--padded-vocab-size": self.padded_vocab_size,
            "--position-embedding-type": "rope",
            "--normalization": "RMSNorm",
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
        }
        if self.rope_scaling_factor:
            named["--rope-scaling-factor"] = self.rope_scaling_factor
        if self.series_activation_order:
            named["--series-activation-order"] = self.series_activation_order
        if self.augmented_shortcuts:
            named["--augmented-shortcuts"] = self.augmented_shortcuts
            named["--augmented-shortcut-reduction"] = self.augmented_shortcut_reduction
        switches = ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
        switches += [] if self.tied else ["--untie-embeddings-and-output-weights"]
        switches += ["--add-qkv-bias"] if self.qkv_bias else []
        switches += ["--use-rope-scaling"] if self.rope_scaling_factor else []
        switches += ["--bf16"] if self.dtype == torch.bfloat16 else []
        return [str(word) for pair in named.items() for word in pair] + switches


def padded(vocab_size: int) -> int:
    """Embedding rows of a checkpoint for a vocabulary of ``vocab_size``."""
    return -(-vocab_size // VOCABULARY_UNIT) * VOCABULARY_UNIT


#: Arguments of the model's function that have one value in every Llama-like model.
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": 1,
}


def _not_llama(saved: Saved) -> Iterator[str]:
    """The reasons why ``saved`` describes a model of another kind."""
    function = model_function.function_of(saved)
    for name, value in LLAMA.items():
        if function[name] not in (value, None):
            yield f"{name} is {function[name]}, not {value}"
    yield from model_function.unknown_here(saved)

"""The description of a model: its function, its tensors, and its FLOPs per token.

All code that needs a model's shape takes a :class:`ModelConfig`: the trainer, the planner, checkpoints,
import and export, inheritance. Each field is a flag; together they define the model's function, so a
checkpoint with other values is another model. Names are Megatron-LM's; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from megatron_ext.common.flags import Option, derived, fits, flag, own_options, spelled, wrong
from megatron_ext.config.needs import GROUPED, ROPE_SCALING, ROTARY, SHORTCUTS

#: Determined by the tokenizer and the layout, not part of the model's function.
_VOCABULARY = ("padded_vocab_size", "softmax_vocab_size")
#: Larger than any size of a model: such a value is damaged or mistyped.
_TOO_LARGE = 1 << 31


class NoSuchModel(ValueError):
    """The shape is not that of a valid model; ``problems`` are the reasons, one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"no such model: {'; '.join(problems)}")
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, with or without the PanGu-pi modules.

    Two sizes have defaults: the FFN's size is 4 h, or 8 h / 3 in multiples of 64 for SwiGLU (which has three
    matrices instead of two), and a head's size is h / n.

    Shapes below use s sequence length, h hidden size, f FFN size, n heads, g query groups, d channels per
    head, v rows of the vocabulary.

    Raises:
        NoSuchModel: with every reason.
    """

    num_layers: int = flag(0, default=None, minimum=1)
    """Number of transformer layers."""

    hidden_size: int = flag(0, default=None, minimum=1)
    """Channels of the residual stream."""

    ffn_hidden_size: int = flag(0, default=None, minimum=1)
    """Channels inside the FFN; by default 4 times --hidden-size, or 8/3 of it in multiples of 64 with
    --swiglu."""

    num_attention_heads: int = flag(0, default=None, minimum=1)
    """Number of attention heads."""

    kv_channels: int = flag(0, default=None, minimum=1)
    """Channels per head; by default --hidden-size divided by --num-attention-heads."""

    group_query_attention: bool = False
    """Share keys and values among groups of query heads; --num-query-groups is the number of groups."""

    num_query_groups: int | None = flag(None, default=1, minimum=1, needs=[GROUPED])
    """Number of groups of query heads that share keys and values (--group-query-attention)."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """The norm before attention and FFN, and at the end."""

    layernorm_epsilon: float = flag(1e-05, "--norm-epsilon", above=0)
    """Term added to the norm's denominator, for numerical stability."""

    add_bias_linear: bool = flag(True, "--disable-bias-linear")
    """No biases in linear layers."""

    add_qkv_bias: bool = False
    """Use biases for queries, keys and values only."""

    qk_layernorm: bool = False
    """Normalize the queries and keys of each head."""

    max_position_embeddings: int = flag(0, default=None, minimum=1)
    """Maximum sequence length of the model; at least --seq-length."""

    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "relative", "none"] = flag(
        "learned_absolute", refused=["mrope", "relative"]
    )
    """Position embedding; PanGu-pi and Llama use rope."""

    rotary_base: int = flag(10000, minimum=1, needs=[ROTARY])
    """Base of the rotary embedding's wavelengths."""

    rotary_percent: float = flag(1.0, minimum=0, maximum=1, needs=[ROTARY])
    """Fraction of each head's channels that is rotated."""

    rotary_seq_len_interpolation_factor: int | None = flag(None, minimum=1, needs=[ROTARY])
    """Divide positions by this factor, to stretch rotary embeddings over longer sequences."""

    use_rope_scaling: bool = flag(False, needs=[ROTARY])
    """Stretch long wavelengths of the rotary embedding as Llama 3.1 and later do: those above 8192 positions
    by --rope-scaling-factor, those below 2048 not at all."""

    rope_scaling_factor: float = flag(8.0, minimum=1, needs=[ROPE_SCALING])
    """Factor of --use-rope-scaling: 8 in Llama 3.1, 32 in the small models of Llama 3.2."""

    swiglu: bool = False
    """Gated FFN with SiLU: silu(x W_gate) * (x W_up)."""

    squared_relu: bool = False
    """Squared ReLU in the FFN instead of GELU."""

    quick_geglu: bool = False
    """Gated FFN with the sigmoid approximation of GELU."""

    untie_embeddings_and_output_weights: bool = False
    """Use separate weights for the output layer instead of the word embedding's."""

    series_activation_order: int = flag(0, minimum=0)
    """Number of terms n of the series informed activation in the FFN; 0 uses the plain activation."""

    augmented_shortcuts: int = flag(0, minimum=0)
    """Number of augmented shortcuts T around the attention; 0 uses only the residual connection."""

    augmented_shortcut_reduction: int = flag(32, minimum=1, needs=[SHORTCUTS])
    """Reduction r of an augmented shortcut's bottleneck, hidden -> hidden/r -> hidden."""

    padded_vocab_size: int | None = flag(None, minimum=1)
    """Rows of the embedding; by default the vocabulary's size rounded up to a multiple of
    --make-vocab-size-divisible-by."""

    softmax_vocab_size: int | None = derived(None)
    """Rows in the softmax: the tokenizer's pieces, possibly with padding (--vocab-padding)."""

    def __post_init__(self) -> None:
        self._fill_in()
        if problems := list(self.problems()):
            raise NoSuchModel(problems)

    @classmethod
    def draft(cls, **values: object) -> ModelConfig:
        """A model that is not validated yet: its :meth:`problems` are reported together with others."""
        config = object.__new__(cls)
        vars(config).update(
            {field.name: values.get(field.name, field.default) for field in dataclasses.fields(cls)}
        )
        config._fill_in()
        return config

    def _fill_in(self) -> None:
        h, n = self.hidden_size, self.num_attention_heads
        if type(h) is not int or type(n) is not int:
            return  # values from files may have any type: problems() reports it
        if not self.ffn_hidden_size and h:
            width = int((4 * h * 2 / 3) / 64) * 64 if self.swiglu else 4 * h
            object.__setattr__(self, "ffn_hidden_size", width)
        if not self.kv_channels and h and n and h % n == 0:
            object.__setattr__(self, "kv_channels", h // n)
        if self.add_bias_linear:
            object.__setattr__(self, "add_qkv_bias", True)

    def problems(self) -> Iterator[str]:
        """The reasons why the model is invalid; sizes first, because the other checks use them."""
        wrong_values = [text for option in own_options(ModelConfig) for text in self._wrong(option)]
        yield from wrong_values
        if wrong_values:
            return
        if not self.kv_channels:
            yield (
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}; change one, or give --kv-channels"
            )
        if self.group_query_attention and self.num_attention_heads % (self.num_query_groups or 1):
            yield (
                f"--num-attention-heads {self.num_attention_heads} is not divisible by "
                f"--num-query-groups {self.num_query_groups}"
            )
        if (
            self.position_embedding_type == "rope"
            and self.rotary_percent == 1
            and (self.kv_channels or 0) % 2
        ):
            yield f"--kv-channels {self.kv_channels}: rotary embeddings turn pairs, give an even number"
        chosen = [name for name in ("swiglu", "squared_relu", "quick_geglu") if getattr(self, name)]
        if len(chosen) > 1:
            yield f"{' and '.join('--' + name.replace('_', '-') for name in chosen)} exclude each other"
        if self.series_activation_order and not self.swiglu:
            yield "--series-activation-order acts on the gate of SwiGLU: add --swiglu"
        if self.augmented_shortcuts and self.hidden_size % self.augmented_shortcut_reduction:
            yield (
                f"--hidden-size {self.hidden_size} is not divisible by --augmented-shortcut-reduction "
                f"{self.augmented_shortcut_reduction}"
            )
        if self.position_embedding_type in ("mrope", "relative"):
            yield (
                f"--position-embedding-type {self.position_embedding_type} is not supported here; "
                "use rope, learned_absolute or none"
            )
        if (self.padded_vocab_size or math.inf) < (self.softmax_vocab_size or 0):
            yield (
                f"--padded-vocab-size {self.padded_vocab_size}: too few rows for a vocabulary of "
                f"{self.softmax_vocab_size}"
            )

    def _wrong(self, option: Option) -> Iterator[str]:
        """Problems of a value by itself."""
        value = getattr(self, option.name)
        yield from wrong(option, value)
        if value is None and option.name != "kv_channels" and not fits(None, option.annotation):
            yield f"nothing says {option.name}"
        no_size = option.name in ("rotary_base", "rotary_seq_len_interpolation_factor")
        if type(value) is int and value >= _TOO_LARGE and not no_size:
            yield f"{spelled(option)} {value}: no model is as large"

    @property
    def tied(self) -> bool:
        """Whether embedding and output layer share one matrix."""
        return not self.untie_embeddings_and_output_weights

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.swiglu or self.quick_geglu

    @property
    def has_pi(self) -> bool:
        """Whether the model has a PanGu-pi module."""
        return bool(self.series_activation_order or self.augmented_shortcuts)

    @property
    def query_groups(self) -> int:
        """g: number of key and value heads."""
        return (self.group_query_attention and self.num_query_groups) or self.num_attention_heads

    @property
    def heads_per_group(self) -> int:
        """n / g: number of query heads that share a key and a value."""
        return self.num_attention_heads // self.query_groups

    @property
    def query_width(self) -> int:
        """n d."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_width(self) -> int:
        """(n + 2 g) d: rows of ``linear_qkv``."""
        return self.query_width + 2 * self.query_groups * self.kv_channels

    @property
    def shortcut_width(self) -> int:
        """T h / r: total width of the bottlenecks of all augmented shortcuts."""
        return self.augmented_shortcuts * (self.hidden_size // self.augmented_shortcut_reduction)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return self.padded_vocab_size or self.softmax_vocab_size or 0

    @property
    def vocab_size(self) -> int:
        """Rows in the softmax: those without padding, or all rows if the number of those is unknown."""
        return self.softmax_vocab_size or self.padded_vocab_size or 0

    @property
    def without_padding(self) -> ModelConfig:
        """The same model with only the rows of the softmax."""
        return dataclasses.replace(self, padded_vocab_size=self.vocab_size)

    def effective(self) -> dict[str, object]:
        """Name -> value of the fields that define the model's function; None for values without effect."""
        values = {name: value for name, value in vars(self).items() if name not in _VOCABULARY}
        values["rotary_seq_len_interpolation_factor"] = self.rotary_seq_len_interpolation_factor or 1
        for option in own_options(ModelConfig):
            if not all(need.holds(SimpleNamespace(model=self)) for need in option.needs):
                values[option.name] = None
        if self.query_groups == self.num_attention_heads:  # a group per head is the same as no groups
            values |= {"group_query_attention": False, "num_query_groups": None}
        if self.position_embedding_type != "learned_absolute":
            values["max_position_embeddings"] = None  # rotary positions are unlimited
        return values

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name in a checkpoint -> shape of every tensor, undivided, in the order of the forward pass.

        The names are Megatron-Core's. The vocabulary's padding is included.
        """
        h, v = self.hidden_size, self.vocab_rows
        tensors: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (v, h)}
        if self.position_embedding_type == "learned_absolute":
            tensors["embedding.position_embeddings.weight"] = (self.max_position_embeddings, h)
        layer = self.layer_parameters()
        for number in range(self.num_layers):
            tensors |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
        tensors |= self._norm("decoder.final_layernorm.", h)
        return tensors if self.tied else tensors | {"output_layer.weight": (v, h)}

    def layer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name below ``decoder.layers.N.`` -> shape of every tensor of one layer."""
        h, f, d = self.hidden_size, self.ffn_hidden_size, self.kv_channels
        tensors = self._norm("self_attention.linear_qkv.layer_norm_", h)
        tensors |= _linear("self_attention.linear_qkv", self.qkv_width, h, self.add_qkv_bias)
        if self.qk_layernorm:
            tensors |= self._norm("self_attention.q_layernorm.", d)
            tensors |= self._norm("self_attention.k_layernorm.", d)
        tensors |= _linear("self_attention.linear_proj", h, self.query_width, self.add_bias_linear)
        if self.augmented_shortcuts:
            tensors["self_attention.augmented_shortcut.down"] = (self.shortcut_width, h)
            tensors["self_attention.augmented_shortcut.up"] = (h, self.shortcut_width)
        tensors |= self._norm("mlp.linear_fc1.layer_norm_", h)
        tensors |= _linear("mlp.linear_fc1", (1 + self.gated) * f, h, self.add_bias_linear)
        if self.series_activation_order:
            tensors["mlp.series_activation.scale"] = (self.series_activation_order, f)
            tensors["mlp.series_activation.bias"] = (self.series_activation_order, f)
        return tensors | _linear("mlp.linear_fc2", h, f, self.add_bias_linear)

    def _norm(self, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        vectors = ("weight",) if self.normalization == "RMSNorm" else ("weight", "bias")
        return {prefix + vector: (width,) for vector in vectors}

    @property
    def num_parameters(self) -> int:
        """Number of parameters, including the vocabulary's padding."""
        one = dataclasses.replace(self, num_layers=1)
        outside = _count(one.parameters()) - _count(one.layer_parameters())
        return outside + self.num_layers * _count(self.layer_parameters())

    def flops_per_token(self, seq_length: int) -> float:
        """FLOPs of forward and backward per token, in sequences of s tokens; only matmuls are counted.

        A multiply-add counts as two, and the backward pass has two products for each one of the forward pass.
        Of causal attention only the unmasked half is counted, as in Megatron-LM 0.16; recomputation is not.
        """
        h = self.hidden_size
        attention = h * self.qkv_width + self.query_width * h + self.query_width * seq_length
        feed_forward = (2 + self.gated) * h * self.ffn_hidden_size
        layer = attention + feed_forward + 2 * h * self.shortcut_width
        return 6.0 * (self.num_layers * layer + h * self.vocab_rows)


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return tensors | {f"{name}.bias": (rows,)} if bias else tensors


def _count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, tensors.values()))

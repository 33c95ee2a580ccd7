"""The description of a model: its function, its tensors, and its FLOPs per token.

All code that needs a model's shape takes a :class:`ModelConfig`: the trainer, the planner, checkpoints,
import and export, inheritance. Each field is a flag; together they define the model's function, so a
checkpoint with other values is another model. Names are Megatron-LM's; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from megatron_ext.common.flags import own_options
from megatron_ext.config import model_rules, model_tensors
from megatron_ext.config.model_fields import ModelFields

#: Determined by the tokenizer and the layout, not part of the model's function.
_VOCABULARY = ("padded_vocab_size", "softmax_vocab_size")


class NoSuchModel(ValueError):
    """The shape is not that of a valid model; ``problems`` are the reasons, one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"no such model: {'; '.join(problems)}")
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelFields):
    """A decoder-only transformer, with or without the PanGu-pi modules.

    Two sizes have defaults: the FFN's size is 4 h, or 8 h / 3 in multiples of 64 for SwiGLU (which has three
    matrices instead of two), and a head's size is h / n.

    Shapes below use s sequence length, h hidden size, f FFN size, n heads, g query groups, d channels per
    head, v rows of the vocabulary.

    Raises:
        NoSuchModel: with every reason.
    """

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
        for name in ("no_rope_freq", "window_size", "window_attn_skip_freq"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
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
        """The reasons why the model is invalid."""
        return model_rules.problems(self)

    @property
    def without_padding(self) -> ModelConfig:
        """The same model with only the rows of the softmax."""
        return dataclasses.replace(self, padded_vocab_size=self.vocab_size)

    @property
    def one_layer(self) -> ModelConfig:
        """The same model with a single layer: all layers have tensors of the same shapes."""
        return dataclasses.replace(self, num_layers=1, no_rope_freq=None, window_attn_skip_freq=None)

    def effective(self) -> dict[str, object]:
        """Name -> value of the fields that define the model's function; None for values without effect."""
        values = {name: value for name, value in vars(self).items() if name not in _VOCABULARY}
        values["rotary_seq_len_interpolation_factor"] = self.rotary_seq_len_interpolation_factor or 1
        for option in own_options(ModelConfig):
            if not all(need.holds(SimpleNamespace(model=self)) for need in option.needs):
                values[option.name] = None
        values |= self._by_layer()
        if self.query_groups == self.num_attention_heads:  # a group per head is the same as no groups
            values |= {"group_query_attention": False, "num_query_groups": None}
        if self.position_embedding_type != "learned_absolute":
            values["max_position_embeddings"] = None  # rotary positions are unlimited
        return values

    def _by_layer(self) -> dict[str, object]:
        """Values of fields with several equivalent spellings, in a common form."""
        if list(self.problems()):
            return {}  # a draft that is not valid
        return {
            "no_rope_freq": self.unrotated,
            "window_size": self.window_size if any(self.windowed) else (-1, 0),
            "window_attn_skip_freq": self.windowed,
            "window_rotary_base": self.window_rotary_base or self.rotary_base,
            "softmax_scale": self.softmax_scale or self.kv_channels**-0.5,
        }

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name in a checkpoint -> shape of every tensor, undivided, in the order of the forward pass.

        The names are Megatron-Core's. The vocabulary's padding is included.
        """
        return model_tensors.of_model(self, self.num_layers)

    def layer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name below ``decoder.layers.N.`` -> shape of every tensor of one layer."""
        return model_tensors.of_layer(self)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, including the vocabulary's padding."""
        return model_tensors.count(self)

    def flops_per_token(self, seq_length: int) -> float:
        """FLOPs of forward and backward per token, in sequences of s tokens; only matmuls are counted.

        A multiply-add counts as two, and the backward pass has two products for each one of the forward pass.
        Of causal attention only the unmasked half is counted, as in Megatron-LM 0.16, and with a window only
        the keys inside it; recomputation is not.
        """
        h = self.hidden_size
        projections = h * self.qkv_width + self.query_width * h
        feed_forward = (2 + self.gated) * h * self.ffn_hidden_size
        layer = projections + feed_forward + 2 * h * self.shortcut_width
        scores = 2 * self.query_width * sum(self.keys_seen(seq_length))
        return 6.0 * (self.num_layers * layer + scores + h * self.vocab_rows)

    def keys_seen(self, seq_length: int) -> list[float]:
        """Mean number of keys that a token of a sequence of s tokens attends to, for each layer.

        Without a window it is s / 2. With a window of w tokens the first w attend to w / 2 on average, the
        others to w.
        """
        w = min(self.window_size[0] + 1, seq_length) if self.window_size else seq_length
        return [w - w * w / (2 * seq_length) if has else seq_length / 2 for has in self.windowed]

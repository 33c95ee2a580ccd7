"""Which tensors of a Hugging Face folder make which tensor of ours: one table, read both ways.

An entry names our tensor (Megatron-LM's checkpoint name, unsharded), those of the other side, and how
they lie in ours:

    Same     one tensor, as it is
    Groups   queries, keys and values, interleaved by query group: [q ... q, k, v] of group 0, of group 1, ...
    Stack    one below the other: [gate; up]

``{}`` stands for the layer. InternLM2's fused ``wqkv`` has Megatron's interleaving already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config.model import ModelConfig
from megatron_ext.interchange.errors import InterchangeError

Size = tuple[int, ...]


class Same:
    """One tensor, as it is."""

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """Theirs -> ours."""
        return parts[0]

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """Ours -> theirs."""
        return [tensor]

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """The sizes of theirs, from the size of ours."""
        return [size]


class Groups(Same):
    """Queries, keys and values; ours is [g * (n/g + 2) * d, h], or without h for the biases.

    Shapes: g query groups, n heads, d channels a head, h hidden.
    """

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """[n * d, h], [g * d, h], [g * d, h] -> [g * (n/g + 2) * d, h]."""
        by_group = [part.unflatten(0, (model.query_groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """The inverse of ``join``."""
        d, queries = model.kv_channels, model.heads_per_group
        by_group = tensor.unflatten(0, (model.query_groups, -1))
        return [part.flatten(0, 1) for part in by_group.split([queries * d, d, d], dim=1)]

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """[n * d, h], [g * d, h], [g * d, h]."""
        heads = (model.num_attention_heads, model.query_groups, model.query_groups)
        return [(count * model.kv_channels, *size[1:]) for count in heads]


class Stack(Same):
    """Two tensors of the same size, one below the other."""

    @staticmethod
    def join(parts: list[Tensor], model: ModelConfig) -> Tensor:
        """[f, h], [f, h] -> [2 * f, h]."""
        return torch.cat(parts)

    @staticmethod
    def split(tensor: Tensor, model: ModelConfig) -> list[Tensor]:
        """The inverse of ``join``."""
        return list(tensor.chunk(2))

    @staticmethod
    def sizes(size: Size, model: ModelConfig) -> list[Size]:
        """[f, h] twice."""
        return [(size[0] // 2, *size[1:])] * 2


@dataclass(frozen=True)
class Entry:
    """One line of the table; ``layer`` fills the ``{}`` of the names."""

    ours: str
    theirs: tuple[str, ...]
    layout: type[Same] = Same
    layer: int | None = None

    def at(self, layer: int) -> Entry:
        """The entry of one layer."""
        names = tuple(name.format(layer) for name in self.theirs)
        return Entry(self.ours.format(layer), names, self.layout, layer)


def _in_layer(ours: str, *theirs: str, layout: type[Same] = Same) -> Entry:
    return Entry(f"decoder.layers.{{}}.{ours}", tuple(f"model.layers.{{}}.{name}" for name in theirs), layout)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")


_LLAMA = (
    Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    _in_layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _in_layer("self_attention.linear_qkv.weight", *_qkv("weight"), layout=Groups),
    _in_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    _in_layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    _in_layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", layout=Stack),
    _in_layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry("output_layer.weight", ("lm_head.weight",)),
)
_QKV_BIAS = (_in_layer("self_attention.linear_qkv.bias", *_qkv("bias"), layout=Groups),)
_PI = (
    _in_layer("self_attention.augmented_shortcut.down", "self_attn.augmented_shortcut.down_proj.weight"),
    _in_layer("self_attention.augmented_shortcut.up", "self_attn.augmented_shortcut.up_proj.weight"),
    _in_layer("mlp.series_activation.scale", "mlp.series_activation.scale"),
    _in_layer("mlp.series_activation.bias", "mlp.series_activation.bias"),
)
_INTERNLM2 = (
    Entry("embedding.word_embeddings.weight", ("model.tok_embeddings.weight",)),
    _in_layer("self_attention.linear_qkv.layer_norm_weight", "attention_norm.weight"),
    _in_layer("self_attention.linear_qkv.weight", "attention.wqkv.weight"),
    _in_layer("self_attention.linear_proj.weight", "attention.wo.weight"),
    _in_layer("mlp.linear_fc1.layer_norm_weight", "ffn_norm.weight"),
    _in_layer("mlp.linear_fc1.weight", "feed_forward.w1.weight", "feed_forward.w3.weight", layout=Stack),
    _in_layer("mlp.linear_fc2.weight", "feed_forward.w2.weight"),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry("output_layer.weight", ("output.weight",)),
)


@dataclass(frozen=True)
class Architecture:
    """One kind of model on Hugging Face's side: its names there, and its table."""

    model_type: str
    class_name: str
    entries: tuple[Entry, ...]
    qkv_bias: bool = False
    """Whether its queries, keys and values have a bias whatever its configuration says."""

    def entries_of(self, model: ModelConfig) -> Iterator[Entry]:
        """The entries of every tensor that ``model`` has, in the order of the forward pass.

        Raises InterchangeError if this kind of model has no place for one.
        """
        if self.qkv_bias and not model.add_qkv_bias:
            raise InterchangeError(f"a {self.class_name} has biases that this model lacks")
        table = {entry.ours: entry for entry in self.entries}
        for name in model.parameters():
            prefix, layer, rest = _parts(name)
            entry = table.get(f"{prefix}{{}}{rest}" if layer is not None else name)
            if entry is None:
                raise InterchangeError(f"a {self.class_name} has no place for {name}")
            yield entry if layer is None else entry.at(layer)


def _parts(name: str) -> tuple[str, int | None, str]:
    """``decoder.layers.3.mlp.x`` -> ("decoder.layers.", 3, ".mlp.x")."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name, None, ""
    number, rest = name.removeprefix(prefix).split(".", 1)
    return prefix, int(number), f".{rest}"


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", _LLAMA),
        Architecture("mistral", "MistralForCausalLM", _LLAMA),
        Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA + _QKV_BIAS, qkv_bias=True),
        Architecture("internlm2", "InternLM2ForCausalLM", _INTERNLM2),
        Architecture("pangu_pi", "PanguPiForCausalLM", _LLAMA + _QKV_BIAS + _PI),
    )
}


def architecture_of(model: ModelConfig) -> Architecture:
    """The plainest kind of model that holds ``model``: Llama, with biases Qwen2, with pi modules PanguPi."""
    return ARCHITECTURES["pangu_pi" if model.has_pi else "qwen2" if model.add_qkv_bias else "llama"]


def architecture_named(model_type: str) -> Architecture:
    """The architecture of that ``model_type``; raises InterchangeError, listing those there are."""
    if model_type not in ARCHITECTURES:
        raise InterchangeError(f"unknown architecture {model_type!r}; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]

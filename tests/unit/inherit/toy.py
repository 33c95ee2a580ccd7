"""Small models of any shape with random weights, and slices of them."""

import torch

from megatron_ext.arguments.parser import configured
from megatron_ext.config import RunConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.slicing import cut, source_key
from megatron_ext.inherit.vocabulary import Rows
from megatron_ext.interchange.llama import llama_like
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.models.layer_specs import CHECKPOINT_NAMES


def config(tied: bool = False, **changes) -> ModelConfig:
    """Three layers, grouped queries, both pi modules."""
    values = dict(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=128,
        padded_vocab_size=128,
        untie_embeddings_and_output_weights=not tied,
        max_position_embeddings=32,
        series_activation_order=2,
        augmented_shortcuts=1,
        augmented_shortcut_reduction=8,
    )
    return llama_like(**values | changes)


def arguments(of: ModelConfig, **changes) -> RunConfig:
    """The trainer's configuration for this model."""
    values = vars(of) | {
        "seq_length": of.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "mock_data": True,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 100,
        "micro_batch_size": 1,
        "train_iters": 1,
        "lr": 1e-3,
    }
    return configured(values, check_files=False).but(**{"pangu_init": "random"} | changes)


def model(of: ModelConfig, seed: int = 1234):
    """A model with weights large enough for every unit to matter; one process."""
    run = arguments(of, seed=seed, init_method_std=0.2)
    built = build_model(transformer_config(run), run)[0].eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name or name.endswith("linear_qkv.bias"):
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return built


def tensors(of_model) -> dict[str, torch.Tensor]:
    """Name in checkpoints -> tensor."""
    named = {}
    for name, value in of_model.named_parameters():
        for ours, saved in CHECKPOINT_NAMES.items():
            name = name.replace(ours, saved)
        named[name] = value.detach()
    return named


def load(into, values: dict[str, torch.Tensor]) -> None:
    """Fill every parameter of a model from tensors by their names in checkpoints."""
    parameters = tensors(into)
    assert parameters.keys() == values.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == values[name].shape, name
        parameter.copy_(values[name])


def random_selection(source: ModelConfig, target: ModelConfig, seed: int) -> Selection:
    """Any units of any layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, keep: int, *rows: int) -> torch.Tensor:
        order = torch.rand(*rows, count, generator=generator).argsort(-1)
        return order[..., :keep].sort(-1).values

    layers = target.num_layers
    return Selection(
        layers=draw(source.num_layers, layers),
        hidden=draw(source.hidden_size, target.hidden_size),
        ffn=draw(source.ffn_hidden_size, target.ffn_hidden_size, layers),
        groups=draw(source.query_groups, target.query_groups, layers),
        bottleneck=draw(source.shortcut_width, target.shortcut_width, layers),
    )


def sliced(
    of_model, source: ModelConfig, target: ModelConfig, selection: Selection, rows: Rows | None = None
):
    """The target's model, cut out of the source's."""
    full, small = tensors(of_model), model(target)
    values = {
        key: cut(key, full[source_key(key, selection)], selection, source, rows) for key in tensors(small)
    }
    load(small, values)
    return small


def logits(of_model, ids: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [b, s, v]."""
    with torch.no_grad():
        return of_model(ids, torch.arange(ids.size(1)).expand_as(ids), None)

"""Small models for tests: a configuration and the arguments that go with it."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_ext.config import RunConfig
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import PanguProConfig

VOCABULARY = 256
SEQUENCE = 48


def small_config(**changes) -> PanguProConfig:
    """Two layers of 64 channels with grouped queries, the pi modules on, for the current layout."""
    values = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        # An interleaved pipeline of two ranks needs this: in a batch of transfers, the one to the
        # next stage and the one to the previous stage go to the same rank and are mixed up.
        transformer_impl="local",
        overlap_p2p_comm=parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None,
        batch_p2p_comm=parallel_state.get_virtual_pipeline_model_parallel_world_size() is None,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        series_activation_order=2,
        augmented_shortcuts=1,
        augmented_shortcut_reduction=8,
    )
    return PanguProConfig(**values | changes)


def small_model(config: PanguProConfig, tied: bool = False, seed: int = 1234, **changes) -> list:
    """The model chunks of this rank, initialised independently of the layout."""
    return build_model(config, model_arguments(tied, seed), **changes)


def model_arguments(tied: bool = False, seed: int = 1234) -> RunConfig:
    """What ``build_model`` reads besides the transformer's configuration."""
    return RunConfig.of(
        dict(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            padded_vocab_size=VOCABULARY,
            max_position_embeddings=SEQUENCE,
            untie_embeddings_and_output_weights=not tied,
            position_embedding_type="rope",
            seed=seed,
        )
    )


def tokens(batch: int = 3, seed: int = 0, length: int = SEQUENCE) -> torch.Tensor:
    """Random token ids, [batch, length]."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions(ids: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... for each row of ``ids``."""
    return torch.arange(ids.size(1)).expand_as(ids)

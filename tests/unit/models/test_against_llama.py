"""With the pi modules off the model is Llama: the same weights give transformers' logits."""

import pytest
import torch

from tests.helpers.models import SEQUENCE, VOCABULARY, positions, small_config, small_model, tokens

transformers = pytest.importorskip("transformers")


def llama(groups: int, tied: bool):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        max_position_embeddings=SEQUENCE,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def interleaved_qkv(attention, groups: int) -> torch.Tensor:
    """[q...q k v] per query group, as Megatron stores them."""
    q, k, v = (
        projection.weight.view(groups, -1, 64)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return torch.cat([q, k, v], dim=1).reshape(-1, 64)


@torch.no_grad()
def copy_weights(source, target, groups: int) -> None:
    base = source.model
    target.embedding.word_embeddings.weight.copy_(base.embed_tokens.weight)
    target.decoder.final_layernorm.weight.copy_(base.norm.weight)
    if not source.config.tie_word_embeddings:
        target.output_layer.weight.copy_(source.lm_head.weight)
    for theirs, ours in zip(base.layers, target.decoder.layers, strict=True):
        ours.input_layernorm.weight.copy_(theirs.input_layernorm.weight)
        ours.pre_mlp_layernorm.weight.copy_(theirs.post_attention_layernorm.weight)
        ours.self_attention.linear_qkv.weight.copy_(interleaved_qkv(theirs.self_attn, groups))
        ours.self_attention.linear_proj.weight.copy_(theirs.self_attn.o_proj.weight)
        ours.mlp.linear_fc1.weight.copy_(torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight]))
        ours.mlp.linear_fc2.weight.copy_(theirs.mlp.down_proj.weight)


@pytest.mark.parametrize("groups", [2, 4], ids=["gqa", "mha"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_logits_equal_transformers_llama(single_process, groups, tied):
    theirs = llama(groups, tied)
    config = small_config(num_query_groups=groups, series_activation_order=0, augmented_shortcuts=0)
    ours = small_model(config, tied=tied)[0].eval()
    copy_weights(theirs, ours, groups)
    ids = tokens()
    torch.testing.assert_close(ours(ids, positions(ids), None), theirs(ids).logits, rtol=1e-5, atol=1e-5)

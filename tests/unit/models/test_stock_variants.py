"""Whatever Megatron-LM's flags describe, our layers compute what its own local layers compute.

The command line goes through the real parser, so the way from flag to configuration is tested too.
"""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_ext.arguments.parser import read_args
from megatron_ext.models.builder import build_model, sum_weight_gradients_in_place
from megatron_ext.models.config import transformer_config
from tests.helpers.models import positions, tokens

SHAPE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48 "
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 255 --attention-dropout 0 --hidden-dropout 0"
)
VARIANTS = {
    "gpt-2": "",
    "gpt-2 untied": "--untie-embeddings-and-output-weights",
    "rope, biases": "--position-embedding-type rope --swiglu --normalization RMSNorm",
    "part of a head rotated": "--position-embedding-type rope --rotary-percent 0.5 --rotary-base 500000",
    "no positions, no biases": "--position-embedding-type none --disable-bias-linear",
    "squared relu": "--position-embedding-type rope --squared-relu --disable-bias-linear",
    "quick gelu gate": "--position-embedding-type rope --quick-geglu --disable-bias-linear",
    "query, key, value biases": "--position-embedding-type rope --disable-bias-linear --add-qkv-bias",
    "norms of queries and keys": "--position-embedding-type rope --qk-layernorm --normalization RMSNorm",
    "one group of queries": "--group-query-attention --num-query-groups 1 --position-embedding-type rope",
    "wide heads": "--kv-channels 32 --position-embedding-type rope",
    "a layer without rotation": "--position-embedding-type rope --no-rope-freq 2",
    "a layer with a window": "--position-embedding-type rope --window-size 9,0 --window-attn-skip-freq [0,1]",
    "another scale of scores": "--position-embedding-type rope --softmax-scale 0.5",
    "gelu gate": "--position-embedding-type rope --geglu --disable-bias-linear",
}


def outcome(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_layers_are_the_stock_layers(single_process, flags):
    run = read_args([*SHAPE.split(), *flags.split()], world_size=1)
    run = run.but(padded_vocab_size=256)
    config = transformer_config(run)
    [ours] = build_model(config, run)
    theirs = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=run.model.qk_layernorm, normalization=run.model.normalization),
        run.model.padded_vocab_size,
        run.model.max_position_embeddings,
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type=run.model.position_embedding_type,
        rotary_percent=run.model.rotary_percent,
        rotary_base=run.model.rotary_base,
    )
    sum_weight_gradients_in_place(theirs)  # there is no buffer to sum them in
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and gains that do something
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs.load_state_dict(ours.state_dict())
    ids = tokens()
    (loss, gradients), (their_loss, their_gradients) = outcome(ours, ids), outcome(theirs, ids)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)

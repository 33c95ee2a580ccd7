"""How a PanGu-pi layer is put together from Megatron-Core's parts and ours.

Two sets of parts, one module tree: the local parts run on a CPU or a GPU with torch alone, those
of Transformer Engine on a GPU with FP8. Checkpoints of one load into the other.
"""

from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.models.attention import AugmentedSelfAttention, ScaledDotProductAttention
from megatron_ext.models.config import PanguProConfig
from megatron_ext.models.mlp import PanguMLP
from megatron_ext.models.norm import HeadsNorm, norm_class

#: The norms are modules of their own here, because the shortcut reads the normed input; in a
#: checkpoint they carry the names that Megatron-LM gives them in either of its specs.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class Parts:
    """The classes that a layer is built from."""

    column_parallel_linear: type
    row_parallel_linear: type
    core_attention: type
    norm: type
    mlp: type


def local_parts(config: PanguProConfig) -> Parts:
    """Megatron-Core's linear layers, our norm, torch's attention."""
    return Parts(
        ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention, norm_class(config), PanguMLP
    )


def transformer_engine_parts(config: PanguProConfig) -> Parts:
    """Transformer Engine's own modules, so that FP8 covers every large matmul of a layer.

    The output layer and the augmented shortcuts stay in the model's precision (docs/precision.md).
    """
    # Importing Transformer Engine can fail on a machine without a GPU: only who asks for it pays.
    from megatron.core.extensions import transformer_engine as te

    from megatron_ext.models.attention_te import TEDocumentAttention
    from megatron_ext.models.mlp_te import TEPanguMLP

    return Parts(
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        TEDocumentAttention,
        te.TENorm,
        TEPanguMLP,
    )


def layer_spec(config: PanguProConfig, parts: Parts) -> ModuleSpec:
    """One transformer layer; the module tree does not depend on the parts."""
    query_norm, key_norm = _query_and_key_norms(config, parts)
    input_norm = IdentityOp if config.norm_placement == "output" else parts.norm
    attention = ModuleSpec(
        module=AugmentedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "output_norm": parts.norm},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_parallel_linear,
            core_attention=parts.core_attention,
            linear_proj=parts.row_parallel_linear,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=input_norm,
            mlp=parts.mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_NAMES,
        ),
    )


def _query_and_key_norms(config: PanguProConfig, parts: Parts) -> tuple[type | ModuleSpec, type | ModuleSpec]:
    """The norms of queries and keys; norms across heads are ours with Transformer Engine, too."""
    if not config.qk_layernorm:
        return IdentityOp, IdentityOp
    if not config.qk_layernorm_across_heads:
        return parts.norm, parts.norm
    query, key = (
        ModuleSpec(module=HeadsNorm, params={"heads": heads})
        for heads in (config.num_attention_heads, config.num_query_groups)
    )
    return query, key


def block_spec(config: PanguProConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm, from the parts ``transformer_impl`` names."""
    local = config.transformer_impl == "local"
    parts = local_parts(config) if local else transformer_engine_parts(config)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules([layer_spec(config, parts)] * layers, parts.norm)

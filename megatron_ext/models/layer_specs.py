"""How a PanGu-pi layer is put together from Megatron-Core's parts and ours."""

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
from megatron_ext.models.norm import norm_class

#: The norms are modules of their own here, because the shortcut reads the normed input; in a
#: checkpoint they carry the names that Megatron-LM gives them in either of its specs.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def local_layer_spec(config: PanguProConfig) -> ModuleSpec:
    """One transformer layer from Megatron-Core's own linear layers; runs on a CPU or a GPU."""
    norm = norm_class(config)
    qk_norm = norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=AugmentedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=PanguMLP,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_NAMES,
        ),
    )


def block_spec(config: PanguProConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[local_layer_spec(config)] * layers, layer_norm=norm_class(config)
    )

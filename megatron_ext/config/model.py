"""The model: Megatron-Core's own fields, what only Megatron-LM's command line has, and PanGu-pi."""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.flags import flag

TRANSFORMER_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_query_groups",
    "normalization",
    "layernorm_epsilon",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "embedding_init_method_std",
)


@dataclass
class ModelArguments:
    """Options of the model that TransformerConfig does not hold, or holds in another form."""

    group_query_attention: bool = False
    """Share keys and values among groups of query heads; --num-query-groups says how many groups."""

    max_position_embeddings: int | None = None
    """Longest sequence the model is built for; at least --seq-length."""

    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "relative", "none"] = (
        "learned_absolute"
    )
    """How positions enter the model; PanGu-pi and Llama use rope."""

    use_rotary_position_embeddings: bool = False
    """Older spelling of --position-embedding-type rope."""

    rotary_base: int = 10000
    """Base of the rotary embedding's wavelengths."""

    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""

    rotary_seq_len_interpolation_factor: int | None = None
    """Positions are divided by this factor, to stretch rotary embeddings over longer sequences."""

    use_rope_scaling: bool = False
    """Stretch long wavelengths of the rotary embedding as Llama 3.1 and later do: those above 8192 positions
    by --rope-scaling-factor, those below 2048 not at all."""

    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling: 8 in Llama 3.1, 32 in the small models of Llama 3.2."""

    swiglu: bool = False
    """Gated FFN with SiLU: silu(x W_gate) * (x W_up)."""

    squared_relu: bool = False
    """Squared ReLU in the FFN instead of GELU."""

    quick_geglu: bool = False
    """Gated FFN with the sigmoid approximation of GELU."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weights instead of the word embedding's."""

    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, at every tensor parallel size alike."""

    transformer_impl: Literal["local", "transformer_engine", "inference_optimized"] | None = None
    """Layers of Megatron-Core (local) or of Transformer Engine; by default Transformer Engine if a
    GPU and the package are there, else local."""

    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Which of Transformer Engine's attention kernels to use; the local layers use torch's
    scaled_dot_product_attention, which chooses for itself."""

    attention_softmax_in_fp32: bool = False
    """The softmax of the attention in fp32. It always is: accepted because it says what is so."""

    use_mcore_models: bool = False
    """Models of Megatron-Core. There are no others: accepted because it says what is so."""

    use_flash_attn: bool = False
    """Flash attention. It is what --attention-backend auto finds: accepted for older scripts."""


@dataclass
class FusionArguments:
    """Fused kernels of Megatron-Core that need CUDA extensions; each switch turns one off."""

    masked_softmax_fusion: bool = flag(True, "--no-masked-softmax-fusion")
    """Do not fuse scaling, masking and softmax of the attention."""

    bias_gelu_fusion: bool = flag(True, "--no-bias-gelu-fusion")
    """Do not fuse bias and GELU."""

    bias_swiglu_fusion: bool = flag(True, "--no-bias-swiglu-fusion")
    """Do not fuse bias and SwiGLU."""

    bias_dropout_fusion: bool = flag(True, "--no-bias-dropout-fusion")
    """Do not fuse bias, dropout and the residual sum."""

    apply_rope_fusion: bool = flag(True, "--no-rope-fusion")
    """Do not use Transformer Engine's fused rotary embedding."""

    gradient_accumulation_fusion: bool = flag(True, "--no-gradient-accumulation-fusion")
    """Do not add weight gradients into the main gradient inside the matrix product."""

    no_persist_layer_norm: bool = False
    """Do not use Apex's persistent layer norm kernel."""


@dataclass
class PanguArguments:
    """PanGu-pi (arXiv 2312.17276) and PanGu-pi Pro (arXiv 2402.02791)."""

    model_preset: str | None = flag(None, metavar="NAME")
    """Take the shape of a published or small model: pangu-pi-1b, pangu-pi-7b, pangu-pi-1b-pro,
    pangu-pi-1.5b-pro, tiny, small. A flag that is typed wins over the preset."""

    series_activation_order: int = 0
    """Terms n of the series informed activation in the FFN; 0 keeps the plain activation."""

    augmented_shortcuts: int = 0
    """Augmented shortcuts T around the attention; 0 keeps the plain residual."""

    augmented_shortcut_reduction: int = 32
    """Reduction r of a shortcut's bottleneck, hidden -> hidden/r -> hidden."""

    pangu_init: Literal["identity", "random"] = "identity"
    """identity: the PanGu-pi modules start without effect, so a plain model can be inherited
    exactly; random: they start like any other weight."""

    round_index: str | None = flag(None, metavar="PATH")
    """Train on the samples that this index selects (tools/build_round.py writes it), epoch after epoch."""

    round_schedule: Literal["restart", "continue"] = "restart"
    """What a round takes from the one before, where --load holds no checkpoint of it yet: restart takes
    the weights of --pretrained-checkpoint, for a schedule from iteration 0; continue goes on with its
    iteration, optimizer and learning rate, so that --train-iters counts all rounds."""

    record_sample_loss: str | None = flag(None, metavar="PATH")
    """Write the loss of every training sample to PATH (.npy) and its manifest: with the frozen model of
    --load, without training (with the data flags of the run that trained it), or see --record-mode."""

    record_mode: Literal["frozen", "online"] = "frozen"
    """frozen: forward only with the loaded model; online: train, and write down each sample's loss as
    it is trained on."""

"""How the layers are built, run and started; nothing here changes what the model computes."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.needs import (
    ADAPTING,
    ENDS_IN_BF16,
    FP4,
    FP8,
    FP16,
    FULL,
    GRAPHS,
    HALF,
    PI,
    SELECTIVE,
)


@dataclass(kw_only=True)
class LayersConfig:
    """Whose layers they are, their kernels and dropout."""

    transformer_impl: Literal["local", "transformer_engine", "inference_optimized"] | None = flag(
        None, refused=["inference_optimized"]
    )
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

    use_rotary_position_embeddings: bool = False
    """Older spelling of --position-embedding-type rope."""

    attention_dropout: float = flag(0.1, minimum=0, below=1)
    """Dropout of the attention's weights."""

    hidden_dropout: float = flag(0.1, minimum=0, below=1)
    """Dropout of the residual stream's additions."""

    cross_entropy_loss_fusion: bool = False
    """Megatron-Core's fused cross entropy. Ours is always in use: accepted because it says what is so."""

    deterministic_mode: bool = False
    """Only kernels that give the same bits again; slower, for tests and for finding faults."""


@dataclass(kw_only=True)
class FusionConfig:
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


@dataclass(kw_only=True)
class RecomputeConfig:
    """Activations that are computed again in the backward pass, to save memory."""

    recompute_activations: bool = False
    """The same as --recompute-granularity selective."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full computes whole layers again; selective the parts that --recompute-modules names, by default the
    attention's core (arXiv 2205.05198)."""

    recompute_method: Literal["uniform", "block"] | None = flag(None, needs=[FULL])
    """uniform recomputes all layers, in units of --recompute-num-layers; block that many layers of each
    pipeline stage, and keeps the activations of the others."""

    recompute_num_layers: int | None = flag(None, minimum=1, needs=[FULL])
    """Layers of a unit, or of a stage; see --recompute-method."""

    recompute_modules: list[str] | None = flag(None, needs=[SELECTIVE])
    """What --recompute-granularity selective computes again: core_attn, layernorm, mlp."""


@dataclass(kw_only=True)
class GraphConfig:
    """CUDA graphs."""

    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = flag(
        "none", refused=["transformer_engine"]
    )
    """local captures each layer in a CUDA graph; none does not."""

    cuda_graph_warmup_steps: int = flag(3, needs=[GRAPHS])
    """Steps before the capture."""


@dataclass(kw_only=True)
class InitConfig:
    """Where the weights and all other random numbers start."""

    model_preset: str | None = flag(None, metavar="NAME")
    """Take the shape of a published or small model: pangu-pi-1b, pangu-pi-7b, pangu-pi-1b-pro,
    pangu-pi-1.5b-pro, tiny, small. A flag that is typed wins over the preset."""

    pangu_init: Literal["identity", "random"] = flag("identity", needs=[PI])
    """identity: the PanGu-pi modules start without effect, so a plain model can be inherited
    exactly; random: they start like any other weight."""

    init_method_std: float = flag(0.02, minimum=0)
    """Standard deviation of initial weights."""

    embedding_init_method_std: float | None = flag(None, minimum=0)
    """Standard deviation of the initial word embedding; by default --init-method-std. With it, the embedding
    has no weight decay (arXiv 2312.16903)."""

    seed: int = flag(1234, minimum=0, maximum=2**31 - 1)
    """Seed of initial weights, data order and dropout."""

    data_parallel_random_init: bool = False
    """Other random numbers on each data parallel rank; the initial weights stay the same."""

    use_cpu_initialization: bool = flag(False, default=None)
    """Draw the initial weights on the CPU. They never depend on the layout or the device here."""


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats; without a flag everything is fp32."""

    bf16: bool = False
    """Weights and activations in bfloat16, main weights and sums in fp32."""

    fp16: bool = False
    """Weights and activations in float16 with loss scaling; on a GPU."""

    loss_scale: float | None = flag(None, above=0, needs=[FP16])
    """Fixed loss scale of --fp16; by default it adapts."""

    initial_loss_scale: float = flag(2**32, above=0, needs=[FP16, ADAPTING])
    """First value of the adapting loss scale."""

    min_loss_scale: float = flag(1.0, above=0, needs=[FP16, ADAPTING])
    """Lowest value of the adapting loss scale."""

    loss_scale_window: float = flag(1000, needs=[FP16, ADAPTING])
    """Steps without overflow after which the loss scale doubles."""

    hysteresis: int = flag(2, minimum=1, needs=[FP16, ADAPTING])
    """Overflows after which the loss scale halves."""

    fp32_residual_connection: bool = flag(False, needs=[HALF])
    """Keep the residual stream in fp32."""

    fp8: Literal["e4m3", "hybrid"] | None = flag(None, "--fp8-format")
    """Matrix products in FP8 through Transformer Engine: e4m3 for all tensors, or hybrid with e5m2 for the
    gradients of activations."""

    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise", "custom"] = flag(
        "delayed", needs=[FP8], refused=["custom"]
    )
    """How FP8 tensors are scaled: delayed by earlier maxima, tensorwise by the tensor's own, blockwise by
    block, mxfp8 by groups of 32 (Blackwell)."""

    fp8_margin: int = flag(0, minimum=0, needs=[FP8])
    """Powers of two between the largest value and FP8's largest number."""

    fp8_amax_history_len: int = flag(1, minimum=1, needs=[FP8])
    """Steps whose maxima delayed scaling remembers."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = flag("most_recent", needs=[FP8])
    """Which of the remembered maxima delayed scaling takes."""

    fp8_param_gather: bool = flag(False, needs=[FP8])
    """Keep the parameters in FP8 and gather them so; needs the distributed optimizer."""

    first_last_layers_bf16: bool = flag(False, needs=[FP8])
    """Keep the first and last layers in bf16 under FP8."""

    num_layers_at_start_in_bf16: int = flag(1, minimum=0, needs=[ENDS_IN_BF16])
    """Layers at the start that stay in bf16."""

    num_layers_at_end_in_bf16: int = flag(1, minimum=0, needs=[ENDS_IN_BF16])
    """Layers at the end that stay in bf16."""

    fp4: Literal["e2m1"] | None = flag(None, "--fp4-format")
    """Matrix products in FP4 through Transformer Engine."""

    fp4_recipe: Literal["nvfp4", "custom"] | None = flag("nvfp4", needs=[FP4], refused=["custom"])
    """How FP4 tensors are scaled."""

    params_dtype: Any = derived(None)
    """torch.dtype of the weights."""

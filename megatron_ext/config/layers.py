"""Implementation, initialization and precision of the layers; nothing here changes the model's function."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.needs import (
    DYNAMIC_SCALE,
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
    """Implementation of the layers, kernels and dropout."""

    transformer_impl: Literal["local", "transformer_engine", "inference_optimized"] | None = flag(
        None, refused=["inference_optimized"]
    )
    """Layers of Megatron-Core (local) or of Transformer Engine; by default Transformer Engine if there is a
    GPU and the package is installed, otherwise local."""

    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention kernel of Transformer Engine; the local layers use torch's scaled_dot_product_attention,
    which chooses its own kernel."""

    attention_softmax_in_fp32: bool = False
    """Compute the softmax of the attention in fp32; always on here."""

    use_mcore_models: bool = False
    """Use the models of Megatron-Core; always on here."""

    use_flash_attn: bool = False
    """Use flash attention; accepted for older scripts, as --attention-backend auto selects it."""

    use_rotary_position_embeddings: bool = False
    """Older spelling of --position-embedding-type rope."""

    attention_dropout: float = flag(0.1, minimum=0, below=1)
    """Dropout of the attention probabilities."""

    hidden_dropout: float = flag(0.1, minimum=0, below=1)
    """Dropout of what attention and FFN add to the residual stream."""

    cross_entropy_loss_fusion: bool = False
    """Use Megatron-Core's fused cross entropy instead of the one here, which is fused too; needs --bf16."""

    deterministic_mode: bool = False
    """Use only bitwise reproducible kernels; slower, for tests and debugging."""


@dataclass(kw_only=True)
class FusionConfig:
    """Fused kernels of Megatron-Core that need CUDA extensions; each flag turns one off."""

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
    """Recomputation of activations in the backward pass, to save memory."""

    recompute_activations: bool = False
    """The same as --recompute-granularity selective."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full recomputes whole layers; selective the parts in --recompute-modules, by default the core of the
    attention (arXiv 2205.05198)."""

    recompute_method: Literal["uniform", "block"] | None = flag(None, needs=[FULL])
    """uniform recomputes all layers, in units of --recompute-num-layers; block recomputes that many layers of
    each pipeline stage, and keeps the activations of the others."""

    recompute_num_layers: int | None = flag(None, minimum=1, needs=[FULL])
    """Layers per unit or per stage; see --recompute-method."""

    recompute_modules: list[str] | None = flag(None, needs=[SELECTIVE])
    """Parts that --recompute-granularity selective recomputes: core_attn, layernorm, mlp."""


@dataclass(kw_only=True)
class GraphConfig:
    """CUDA graphs."""

    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = flag(
        "none", refused=["transformer_engine"]
    )
    """local captures each layer in a CUDA graph; none uses no graphs."""

    cuda_graph_warmup_steps: int = flag(3, needs=[GRAPHS])
    """Number of steps before the graphs are captured."""


@dataclass(kw_only=True)
class InitConfig:
    """Initial weights, and the seeds of all random numbers."""

    model_preset: str | None = flag(None, metavar="NAME")
    """Use the shape of a published or small model: pangu-pi-1b, pangu-pi-7b, pangu-pi-1b-pro,
    pangu-pi-1.5b-pro, qwen3-0.6b, qwen3-1.7b, llama-3.2-1b, smollm2-135m, smollm2-360m, smollm2-1.7b,
    olmo2-1b, openpangu-1b, tiny, small. Flags on the command line override the preset."""

    pangu_init: Literal["identity", "random"] = flag("identity", needs=[PI])
    """Initialization of the PanGu-pi modules. identity: without effect, so that a plain model can be
    inherited exactly; random: like other weights."""

    init_method_std: float = flag(0.02, minimum=0)
    """Standard deviation of the initial weights."""

    embedding_init_method_std: float | None = flag(None, minimum=0)
    """Standard deviation of the initial word embedding; by default --init-method-std. If given, the embedding
    has no weight decay (arXiv 2312.16903)."""

    seed: int = flag(1234, minimum=0, maximum=2**31 - 1)
    """Seed of the initial weights, the data order and dropout."""

    data_parallel_random_init: bool = False
    """Use different random numbers on each data parallel rank; the initial weights stay the same."""

    use_cpu_initialization: bool = flag(False, default=None)
    """Initialize weights on the CPU; their values are independent of layout and device here."""


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats; the default is fp32 everywhere."""

    bf16: bool = False
    """Weights and activations in bfloat16; main weights and accumulation in fp32."""

    fp16: bool = False
    """Weights and activations in float16 with loss scaling; needs a GPU."""

    loss_scale: float | None = flag(None, above=0, needs=[FP16])
    """Constant loss scale of --fp16; by default it is dynamic."""

    initial_loss_scale: float = flag(2**32, above=0, needs=[FP16, DYNAMIC_SCALE])
    """Initial value of the dynamic loss scale."""

    min_loss_scale: float = flag(1.0, above=0, needs=[FP16, DYNAMIC_SCALE])
    """Minimum of the dynamic loss scale."""

    loss_scale_window: float = flag(1000, needs=[FP16, DYNAMIC_SCALE])
    """Steps without overflow after which the loss scale doubles."""

    hysteresis: int = flag(2, minimum=1, needs=[FP16, DYNAMIC_SCALE])
    """Number of overflows after which the loss scale halves."""

    fp32_residual_connection: bool = flag(False, needs=[HALF])
    """Keep the residual stream in fp32."""

    fp8: Literal["e4m3", "hybrid"] | None = flag(None, "--fp8-format")
    """Matrix products in FP8 through Transformer Engine: e4m3 for all tensors, or hybrid with e5m2 for the
    gradients of activations."""

    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise", "custom"] = flag(
        "delayed", needs=[FP8], refused=["custom"]
    )
    """Scaling of FP8 tensors: delayed by earlier maxima, tensorwise by the current maximum, blockwise per
    block, mxfp8 per 32 values (Blackwell)."""

    fp8_margin: int = flag(0, minimum=0, needs=[FP8])
    """Margin of the scaling factor, in powers of two."""

    fp8_amax_history_len: int = flag(1, minimum=1, needs=[FP8])
    """Length of the maxima's history for delayed scaling, in steps."""

    fp8_amax_compute_algo: Literal["most_recent", "max"] = flag("most_recent", needs=[FP8])
    """Which maximum of the history delayed scaling uses."""

    fp8_param_gather: bool = flag(False, needs=[FP8])
    """Keep and gather the parameters in FP8; needs the distributed optimizer."""

    first_last_layers_bf16: bool = flag(False, needs=[FP8])
    """Keep the first and last layers in bf16 with FP8."""

    num_layers_at_start_in_bf16: int = flag(1, minimum=0, needs=[ENDS_IN_BF16])
    """Number of first layers to keep in bf16."""

    num_layers_at_end_in_bf16: int = flag(1, minimum=0, needs=[ENDS_IN_BF16])
    """Number of last layers to keep in bf16."""

    fp4: Literal["e2m1"] | None = flag(None, "--fp4-format")
    """Matrix products in FP4 through Transformer Engine."""

    fp4_recipe: Literal["nvfp4", "custom"] | None = flag("nvfp4", needs=[FP4], refused=["custom"])
    """Scaling of FP4 tensors."""

    params_dtype: Any = derived(None)
    """torch.dtype of the weights."""

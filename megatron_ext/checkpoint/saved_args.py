"""The arguments in a checkpoint. All code that reads them does so through this module.

The author of a checkpoint also wrote its arguments, so they are untrusted data. Only the names listed here
are used, each with a value of its flag's type: sizes, numbers, switches and words that describe the model,
its tokenizer, and its training so far. Arguments that trust code (trust_remote_code), relax a check, name a
place to read from or write to, or start something on this machine are not listed, and keep the user's values.
``tokenizer_model`` is the only path: it is read as data and never as code (megatron_ext/tokenizer/build.py).
"""

import enum
import signal
import types
import typing
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_ext.checkpoint.bounds import bytes_in
from megatron_ext.checkpoint.errors import DamagedCheckpoint
from megatron_ext.config import RunConfig, model_function, options
from megatron_ext.config.model_function import Saved
from megatron_ext.config.run import is_named

#: Flags that describe the model and its numerics.
MODEL = (
    *model_function.names(),
    *("use_rotary_position_embeddings", "seq_length", "attention_dropout", "hidden_dropout"),
    *("attention_softmax_in_fp32", "fp32_residual_connection", "bf16", "fp16"),
    *("make_vocab_size_divisible_by", "padded_vocab_size"),
)
TOKENIZER = (
    *("tokenizer_type", "tokenizer_model", "vocab_size"),
    *("tokenizer_hf_use_fast", "tokenizer_hf_include_special_tokens"),
)
#: Flags of its training: compared with this run or reported, but never applied.
_TRAINING = (
    *("seed", "split", "micro_batch_size", "global_batch_size", "rampup_batch_size", "train_iters"),
    *("train_samples", "optimizer", "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_warmup_fraction"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init", "weight_decay", "start_weight_decay"),
    *("end_weight_decay", "weight_decay_incr_style", "eval_interval", "eval_iters", "full_validation"),
    *("skip_train", "mock_data", "dataloader_type", "reset_position_ids", "reset_attention_mask"),
    *("eod_mask_loss", "round_schedule", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("context_parallel_size", "use_distributed_optimizer", "decrease_batch_size_if_needed"),
    *("adam_beta1", "adam_beta2", "adam_eps"),
)
#: Counters, values derived from flags, and arguments of Megatron-LM without a flag here: other kinds of model
#: (``model_function.ALWAYS``), in order to refuse them.
_MORE: dict[str, Any] = {
    **dict.fromkeys(("iteration", "consumed_train_samples", "consumed_valid_samples"), int),
    **dict.fromkeys(("skipped_train_samples", "world_size", "data_parallel_size"), int),
    **dict.fromkeys(("virtual_pipeline_model_parallel_size", "softmax_vocab_size"), int),
    **dict.fromkeys(("num_experts", "mtp_num_layers"), int),
    **dict.fromkeys(("norm_epsilon", "rotary_scaling_factor", "activation_func_clamp_value"), float),
    **dict.fromkeys(("glu_linear_offset",), float),
    **dict.fromkeys(("rotary_interleaved", "apply_layernorm_1p"), bool),
    **dict.fromkeys(("multi_latent_attention", "openai_gelu", "qk_l2_norm", "attention_output_gate"), bool),
    **dict.fromkeys(("apply_query_key_layer_scaling", "is_hybrid_model", "sft", "onnx_safe"), bool),
    **dict.fromkeys(("softmax_type", "rope_type", "hybrid_override_pattern"), str),
    **dict.fromkeys(("experimental_attention_variant", "tokenizer_sha256"), str),
    **dict.fromkeys(("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"), str),
    **dict.fromkeys(("linear_attention_freq",), int | list[int] | str),
    **dict.fromkeys(("mrope_section",), list[int]),
    "apply_residual_connection_post_layernorm": bool,
    "params_dtype": torch.dtype,
}
#: No size or count of a real run is larger; float64 represents it exactly.
_MAX_NUMBER = 2**53
_MAX_TEXT = 4096
#: Long enough for a list with an entry for each layer.
_MAX_LIST = 4096


def arguments_of(run: RunConfig, **more: Any) -> Namespace:
    """The arguments stored in a checkpoint of ``run``, as values that every reader can load."""
    return Namespace(**{name: plain(value) for name, value in (run.flat() | more).items()})


def plain(value: Any) -> Any:
    """Numbers, text, dtypes and upstream's enums as they are, containers item by item, the rest as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else str(value)
    if isinstance(value, Path):
        return str(value)
    ours = isinstance(value, enum.Enum) and type(value).__module__.startswith("megatron_ext")
    if ours or isinstance(value, signal.Signals):  # Python 3.10 pickles a signal as a name to look up
        return value.name
    known = value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | enum.Enum)
    return value if known else str(value)


def run_of(saved: Saved) -> RunConfig:
    """The saved arguments as a configuration; missing ones have their default."""
    return RunConfig.of({name: value for name, value in saved.items() if is_named(name)})


def harmless(saved: Any, path: Path) -> Saved:
    """The arguments of ``common.pt`` at ``path`` that are listed above; others are ignored.

    Raises DamagedCheckpoint if they are not a Namespace, or one of model, tokenizer or counters has a
    value of another type.
    """
    if not isinstance(saved, Namespace):
        raise DamagedCheckpoint(f"{path}: args is {_kind(saved)}, not the arguments of a run")
    passed: dict[str, Any] = {}
    for name in (*MODEL, *TOKENIZER, *_TRAINING, *_MORE):
        if name not in saved:
            continue
        value, wanted = vars(saved)[name], _type_of(name)
        if value is None or _fits(value, wanted):
            passed[name] = value
        elif name not in _TRAINING:
            raise DamagedCheckpoint(f"{path}: its argument {name} is {_kind(value)}; {_meaning(wanted)}")
    return passed


def require_room(saved: Saved, folder: Path) -> None:
    """Raise DamagedCheckpoint if ``saved`` describes a model that is too large for the files in ``folder``.

    Every number format has at least one byte, so the files have at least one byte per parameter.
    """

    def size(name: str) -> int:
        return saved.get(name) or 0

    hidden, ffn = size("hidden_size"), size("ffn_hidden_size")
    layer = hidden * (ffn + size("num_attention_heads") * size("kv_channels"))
    layer += 2 * ffn * size("series_activation_order")
    layer += (
        2 * hidden * size("augmented_shortcuts") * (hidden // (size("augmented_shortcut_reduction") or 1))
    )
    rows = size("padded_vocab_size")
    if saved.get("position_embedding_type") == "learned_absolute":
        rows += size("max_position_embeddings")
    least, there = hidden * rows + layer * size("num_layers"), bytes_in(folder)
    if least > there:
        raise DamagedCheckpoint(
            f"{folder / 'common.pt'}: its args describe a model of over {least} parameters, and all its "
            f"files have {there} bytes"
        )


def _type_of(name: str) -> Any:
    """The annotated type of an argument, from its flag if there is one."""
    if name in _MORE:
        return _MORE[name]
    option = options()[name]
    return Literal[tuple(option.meta["choices"])] if "choices" in option.meta else option.annotation


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of an annotated type: non-negative integers, finite numbers, short text."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind) for kind in inner if kind is not type(None))
    if origin is Literal:
        return type(value) in (str, int) and value in inner
    if origin in (list, tuple):
        few = isinstance(value, list | tuple) and len(value) <= _MAX_LIST
        return few and all(_fits(item, inner[0]) for item in value)
    if wanted is int:
        return type(value) is int and 0 <= value < _MAX_NUMBER
    if wanted is float:
        return type(value) in (int, float) and abs(value) < _MAX_NUMBER
    if wanted is str:
        return type(value) is str and len(value) <= _MAX_TEXT and value.isprintable()
    return type(value) is wanted


def _kind(value: Any) -> str:
    """A value's type, or the value if it is short; others may be too large or too deep to print."""
    if isinstance(value, str):
        return repr(value[:60])
    small = type(value) in (int, float) and abs(value) < _MAX_NUMBER
    return repr(value) if small else f"of type {type(value).__name__}, or too large"


def _meaning(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return f"known are {', '.join(map(str, typing.get_args(wanted)))}"
    return f"it must be {getattr(wanted, '__name__', wanted)}"

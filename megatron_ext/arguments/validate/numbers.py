"""Sizes that must be given, and ranges of numbers."""

import math

from megatron_ext.config import flag_of
from megatron_ext.config.presets import PRESETS

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings")

#: At least 1 where given.
POSITIVE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "seq_length", "max_position_embeddings", "micro_batch_size", "global_batch_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "recompute_num_layers"),
    *("num_virtual_stages_per_pipeline_rank", "microbatch_group_size_per_vp_stage"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "ddp_bucket_size"),
    *("save_interval", "save_retain_interval", "eval_interval", "log_interval", "exit_interval"),
    *("exit_duration_in_mins", "tensorboard_log_interval", "tensorboard_queue_size", "world_size"),
    *("make_vocab_size_divisible_by", "vocab_size", "padded_vocab_size", "rotary_base"),
    *("distributed_timeout_seconds_after_init",),
    *("distributed_timeout_minutes", "num_dataset_builder_threads", "hysteresis", "train_iters"),
    *("train_samples", "augmented_shortcut_reduction", "rotary_seq_len_interpolation_factor"),
    *("rope_scaling_factor",),
    *("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    *("fp8_amax_history_len", "ckpt_step", "keep_latest_k"),
)
NOT_NEGATIVE = (
    *("series_activation_order", "augmented_shortcuts", "eval_iters", "num_workers", "lr", "min_lr"),
    *("skip_bad_iterations", "watchdog_minutes"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad", "lr_warmup_init"),
    *("lr_warmup_iters", "lr_warmup_samples", "init_method_std", "embedding_init_method_std"),
    *("manual_gc_interval", "profile_step_start", "profile_step_end", "fp8_margin", "seed"),
    *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
)
ABOVE_ZERO = ("adam_eps", "layernorm_epsilon", "loss_scale", "initial_loss_scale", "min_loss_scale")
BELOW_ONE = ("attention_dropout", "hidden_dropout", "adam_beta1", "adam_beta2", "sgd_momentum")
UP_TO_ONE = ("rotary_percent", "lr_warmup_fraction")


def missing(args) -> list[str]:
    """The required sizes that neither a flag nor a preset gives."""
    return [name for name in (*REQUIRED, "micro_batch_size") if getattr(args, name) is None]


def sizes_are_given(args, typed):
    if args.model_preset not in (None, *PRESETS):
        return  # reported already, and the reason for what is missing
    for name in missing(args):
        preset = ", or a --model-preset that sets it" if name in REQUIRED else ""
        yield f"{flag_of(name)} is required{preset}"


def numbers_are_in_range(args, typed):
    for names, holds, meaning in (
        (POSITIVE, lambda value: value >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
        (ABOVE_ZERO, lambda value: 0 < value < math.inf, "above 0"),
        (BELOW_ONE, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (UP_TO_ONE, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                yield f"{flag_of(name)} {value}: must be {meaning}"


RULES = (sizes_are_given, numbers_are_in_range)

"""Flags that do something only together with others: the one table."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Dependence:
    """Flags that do something only where ``holds``; ``needs`` says what to add or leave out."""

    names: tuple[str, ...]
    holds: Callable[[Namespace], object]
    needs: str


DEPENDENCES = (
    Dependence(("num_query_groups",), lambda a: a.group_query_attention, "--group-query-attention"),
    Dependence(
        ("rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor", "use_rope_scaling"),
        lambda a: a.position_embedding_type == "rope",
        "--position-embedding-type rope",
    ),
    Dependence(("rope_scaling_factor",), lambda a: a.use_rope_scaling, "--use-rope-scaling"),
    Dependence(
        ("augmented_shortcut_reduction",), lambda a: a.augmented_shortcuts, "--augmented-shortcuts above 0"
    ),
    Dependence(
        ("pangu_init",),
        lambda a: a.augmented_shortcuts or a.series_activation_order,
        "--series-activation-order or --augmented-shortcuts above 0",
    ),
    Dependence(("round_schedule",), lambda a: a.round_index, "--round-index"),
    Dependence(("record_mode",), lambda a: a.record_sample_loss, "--record-sample-loss"),
    Dependence(("adam_beta1", "adam_beta2", "adam_eps"), lambda a: a.optimizer == "adam", "--optimizer adam"),
    Dependence(("sgd_momentum",), lambda a: a.optimizer == "sgd", "--optimizer sgd"),
    Dependence(
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        lambda a: a.lr_decay_style == "WSD",
        "--lr-decay-style WSD",
    ),
    Dependence(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        lambda a: a.fp16,
        "--fp16",
    ),
    Dependence(
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        lambda a: a.loss_scale is None,
        "an adapting loss scale, without --loss-scale",
    ),
    Dependence(("grad_reduce_in_bf16",), lambda a: a.bf16, "--bf16"),
    Dependence(("fp32_residual_connection",), lambda a: a.bf16 or a.fp16, "--bf16 or --fp16"),
    Dependence(
        ("fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"),
        lambda a: a.fp8,
        "--fp8-format",
    ),
    Dependence(("fp8_param_gather", "first_last_layers_bf16"), lambda a: a.fp8, "--fp8-format"),
    Dependence(
        ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        lambda a: a.first_last_layers_bf16,
        "--first-last-layers-bf16",
    ),
    Dependence(
        ("cuda_graph_warmup_steps",), lambda a: a.cuda_graph_impl != "none", "--cuda-graph-impl local"
    ),
    Dependence(("fp4_recipe",), lambda a: a.fp4, "--fp4-format"),
    Dependence(
        ("skip_bad_iterations",),
        lambda a: a.check_for_nan_in_loss_and_grad,
        "the check that --no-check-for-nan-in-loss-and-grad turns off, and no adapting loss scale of --fp16",
    ),
    Dependence(("manual_gc_interval", "manual_gc_eval"), lambda a: a.manual_gc, "--manual-gc"),
    Dependence(
        ("microbatch_group_size_per_vp_stage", "overlap_p2p_comm"),
        lambda a: a.virtual_pipeline_model_parallel_size,
        "the interleaved schedule (--num-layers-per-virtual-pipeline-stage)",
    ),
    Dependence(
        ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        lambda a: a.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size above 1",
    ),
    Dependence(
        ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        lambda a: a.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size above 1",
    ),
    Dependence(("cp_comm_type",), lambda a: a.context_parallel_size > 1, "--context-parallel-size above 1"),
    Dependence(("align_grad_reduce",), lambda a: a.overlap_grad_reduce, "--overlap-grad-reduce"),
    Dependence(
        ("recompute_method", "recompute_num_layers"),
        lambda a: a.recompute_granularity == "full",
        "--recompute-granularity full",
    ),
    Dependence(
        ("recompute_modules",),
        lambda a: a.recompute_granularity == "selective",
        "--recompute-granularity selective",
    ),
    Dependence(
        ("save_interval", "save_retain_interval", "async_save", "no_save_optim", "no_save_rng"),
        lambda a: a.save,
        "--save",
    ),
    Dependence(
        ("distrib_optim_fully_reshardable_mem_efficient",),
        lambda a: a.save and a.use_distributed_optimizer,
        "--save and --use-distributed-optimizer",
    ),
    Dependence(("ckpt_fully_parallel_save", "log_progress", "keep_latest_k"), lambda a: a.save, "--save"),
    Dependence(
        ("ckpt_step", "exit_on_missing_checkpoint", "pretrained_checkpoint"), lambda a: a.load, "--load"
    ),
    Dependence(
        ("no_load_optim", "no_load_rng", "finetune", "dist_ckpt_strictness"),
        lambda a: a.load,
        "--load",
    ),
    Dependence(
        ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"), lambda a: a.load, "--load"
    ),
    Dependence(
        ("override_training_set",),
        lambda a: a.load and not a.round_index and not a.skip_train and not a.finetune,
        "--load, without --finetune, --skip-train and --round-index",
    ),
    Dependence(
        ("tensorboard_log_interval", "tensorboard_queue_size", "log_timers_to_tensorboard"),
        lambda a: a.tensorboard_dir,
        "--tensorboard-dir",
    ),
    Dependence(
        ("log_validation_ppl_to_tensorboard", "log_memory_to_tensorboard", "log_world_size_to_tensorboard"),
        lambda a: a.tensorboard_dir,
        "--tensorboard-dir",
    ),
    Dependence(("log_loss_scale_to_tensorboard",), lambda a: a.tensorboard_dir, "--tensorboard-dir"),
    Dependence(
        ("wandb_exp_name", "wandb_save_dir", "wandb_entity"), lambda a: a.wandb_project, "--wandb-project"
    ),
    Dependence(
        ("profile_step_start", "profile_step_end", "use_pytorch_profiler"),
        lambda a: a.profile,
        "--profile",
    ),
    Dependence(
        ("profile_ranks",),
        lambda a: a.profile or a.record_memory_history,
        "--profile or --record-memory-history",
    ),
    Dependence(("memory_snapshot_path",), lambda a: a.record_memory_history, "--record-memory-history"),
    Dependence(("record_memory_history", "empty_unused_memory_level"), lambda a: a.device == "cuda", "a GPU"),
    Dependence(
        ("tokenizer_hf_use_fast", "tokenizer_hf_include_special_tokens", "trust_remote_code"),
        lambda a: a.tokenizer_type == "HuggingFaceTokenizer",
        "--tokenizer-type HuggingFaceTokenizer",
    ),
    Dependence(
        ("tokenizer_model",), lambda a: a.tokenizer_type != "NullTokenizer", "another --tokenizer-type"
    ),
    Dependence(("split",), lambda a: a.data_path or a.data_args_path or a.mock_data, "--data-path"),
    Dependence(
        ("data_cache_path", "mmap_bin_files"), lambda a: not a.mock_data, "data instead of --mock-data"
    ),
)

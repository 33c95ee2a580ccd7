"""Conditions under which flags have an effect, used by fields in ``flag(..., needs=[...])``."""

from megatron_ext.common.flags import Need

GROUPED = Need("--group-query-attention", lambda run: run.model.group_query_attention)
ROTARY = Need("--position-embedding-type rope", lambda run: run.model.position_embedding_type == "rope")
ROPE_SCALING = Need("--use-rope-scaling", lambda run: run.model.use_rope_scaling)
QK_NORM = Need("--qk-layernorm", lambda run: run.model.qk_layernorm)
WINDOW = Need("--window-size", lambda run: run.model.window_size is not None)
SHORTCUTS = Need("--augmented-shortcuts above 0", lambda run: run.model.augmented_shortcuts)
PI = Need("--series-activation-order or --augmented-shortcuts above 0", lambda run: run.model.has_pi)
ROUND = Need("--round-index", lambda run: run.rounds.round_index)
RECORDING = Need("--record-sample-loss", lambda run: run.rounds.record_sample_loss)
TEACHER_MODEL = Need("--teacher-load", lambda run: run.distillation.teacher_load)
TEACHER = Need(
    "--teacher-load or --teacher-logits",
    lambda run: run.distillation.teacher_load or run.distillation.teacher_logits,
)
RECORDING_TEACHER = Need("--record-teacher-logits", lambda run: run.distillation.record_teacher_logits)
ADAM = Need("--optimizer adam, muon or dist_muon", lambda run: run.optimizer.optimizer != "sgd")
MUON = Need("--optimizer muon or dist_muon", lambda run: run.optimizer.is_muon)
SGD = Need("--optimizer sgd", lambda run: run.optimizer.optimizer == "sgd")
WSD = Need("--lr-decay-style WSD", lambda run: run.schedule.lr_decay_style == "WSD")
FP16 = Need("--fp16", lambda run: run.precision.fp16)
BF16 = Need("--bf16", lambda run: run.precision.bf16)
HALF = Need("--bf16 or --fp16", lambda run: run.precision.bf16 or run.precision.fp16)
DYNAMIC_SCALE = Need(
    "a dynamic loss scale, without --loss-scale", lambda run: run.precision.loss_scale is None
)
FP8 = Need("--fp8-format", lambda run: run.precision.fp8)
FP4 = Need("--fp4-format", lambda run: run.precision.fp4)
ENDS_IN_BF16 = Need("--first-last-layers-bf16", lambda run: run.precision.first_last_layers_bf16)
GRAPHS = Need("--cuda-graph-impl local", lambda run: run.graphs.cuda_graph_impl != "none")
FULL = Need("--recompute-granularity full", lambda run: run.recompute.recompute_granularity == "full")
SELECTIVE = Need(
    "--recompute-granularity selective", lambda run: run.recompute.recompute_granularity == "selective"
)
CHECKED = Need(
    "the check that --no-check-for-nan-in-loss-and-grad turns off, and no dynamic loss scale of --fp16",
    lambda run: run.training.check_for_nan_in_loss_and_grad,
)
MANUAL_GC = Need("--manual-gc", lambda run: run.training.manual_gc)
INTERLEAVED = Need(
    "the interleaved schedule (--num-layers-per-virtual-pipeline-stage)",
    lambda run: run.parallel.virtual_pipeline_model_parallel_size,
)
PIPELINE = Need(
    "--pipeline-model-parallel-size above 1", lambda run: run.parallel.pipeline_model_parallel_size > 1
)
CONTEXT = Need("--context-parallel-size above 1", lambda run: run.parallel.context_parallel_size > 1)
OVERLAP = Need("--overlap-grad-reduce", lambda run: run.parallel.overlap_grad_reduce)
SAVE = Need("--save", lambda run: run.checkpoint.save)
SAVE_SHARDED = Need(
    "--save and --use-distributed-optimizer",
    lambda run: run.checkpoint.save and run.parallel.use_distributed_optimizer,
)
EVAL_TASKS = Need("--eval-tasks", lambda run: run.validation.eval_tasks)
LOAD = Need("--load", lambda run: run.checkpoint.load)
GOES_ON = Need(
    "--load, without --finetune, --skip-train and --round-index",
    lambda run: (
        run.checkpoint.load
        and not (run.rounds.round_index or run.validation.skip_train or run.checkpoint.finetune)
    ),
)
TENSORBOARD = Need("--tensorboard-dir", lambda run: run.logging.tensorboard_dir)
WANDB = Need("--wandb-project", lambda run: run.logging.wandb_project)
PROFILE = Need("--profile", lambda run: run.profiling.profile)
PROFILE_OR_MEMORY = Need(
    "--profile or --record-memory-history",
    lambda run: run.profiling.profile or run.profiling.record_memory_history,
)
MEMORY_HISTORY = Need("--record-memory-history", lambda run: run.profiling.record_memory_history)
GPU = Need("a GPU", lambda run: run.process.device == "cuda")
HUGGING_FACE = Need(
    "--tokenizer-type HuggingFaceTokenizer",
    lambda run: run.tokenizer.tokenizer_type == "HuggingFaceTokenizer",
)
A_MODEL_FILE = Need("another --tokenizer-type", lambda run: run.tokenizer.tokenizer_type != "NullTokenizer")
SPLIT = Need("--data-path", lambda run: run.data.is_split or run.data.mock_data)
DATA = Need("data instead of --mock-data", lambda run: not run.data.mock_data)

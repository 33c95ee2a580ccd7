"""A model from a checkpoint, with its own arguments and tokenizer, ready to be asked."""

from argparse import Namespace

from megatron_ext.arguments import derive
from megatron_ext.arguments.configs import padded_vocab_size, transformer_config
from megatron_ext.arguments.factory import default_of
from megatron_ext.arguments.groups import options
from megatron_ext.models.builder import build_model
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.training import distributed
from megatron_ext.training.checkpointing import load_checkpoint, read_checkpoint_args


def load_for_inference(
    load: str, iteration: int | None = None, tokenizer_model: str | None = None, **overrides
) -> tuple:
    """Build the model that the checkpoint in ``load`` describes and load its weights.

    The processes of the job, one or more, all go to tensor parallelism: a checkpoint loads on any
    layout. ``overrides`` replace arguments that the checkpoint was made with.

    Returns (model, tokenizer, arguments).
    """
    args = read_checkpoint_args(load, iteration)
    if args is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found")
    adapt(args, load, iteration)
    vars(args).update(overrides)
    if tokenizer_model:
        args.tokenizer_model = tokenizer_model
    distributed.initialize(args)
    tokenizer = build_tokenizer(args)
    args.padded_vocab_size = padded_vocab_size(tokenizer.vocab_size, args)
    args.tokenizer_sha256 = tokenizer.sha256
    model = build_model(transformer_config(args), args)
    if load_checkpoint(load, model=model, args=args, iteration=iteration) is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found")
    return model[0].eval(), tokenizer, args


def adapt(args: Namespace, load: str, iteration: int | None) -> None:
    """Replace what belongs to the training job and its machine by what belongs to this one.

    A checkpoint of Megatron-LM itself lacks the arguments that are ours: they get their defaults.
    """
    for name, option in options().items():
        if not hasattr(args, name):
            setattr(args, name, default_of(option))
    args.local_rank = None
    derive.from_environment(args, None)
    args.device = "auto"
    args.transformer_impl = args.distributed_backend = None
    problems = derive.device(args, None)
    if problems:
        raise ValueError("; ".join(problems))
    args.attention_backend = "auto"
    args.fp8 = args.fp4 = None
    args.tensor_model_parallel_size = args.world_size
    args.pipeline_model_parallel_size = args.context_parallel_size = args.data_parallel_size = 1
    args.virtual_pipeline_model_parallel_size = None
    args.sequence_parallel = args.use_distributed_optimizer = False
    args.recompute_granularity = None
    args.rampup_batch_size = None
    args.micro_batch_size = args.global_batch_size = 1
    args.load, args.ckpt_step = load, iteration

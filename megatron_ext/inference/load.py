"""A model from a checkpoint, with its own arguments and tokenizer, ready to be asked."""

from argparse import Namespace
from pathlib import Path

from megatron_ext.arguments import derive, validate
from megatron_ext.arguments.parser import with_defaults
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint import load_checkpoint, read_checkpoint_args, saved_args
from megatron_ext.config import model_function
from megatron_ext.interchange import tokenizer_files
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.training import distributed


def load_for_inference(
    load: str,
    iteration: int | None = None,
    tokenizer_model: str | None = None,
    trust_remote_code: bool = False,
    **overrides,
) -> tuple:
    """Build the model that the checkpoint in ``load`` describes and load its weights.

    The processes of the job, one or more, all go to tensor parallelism: a checkpoint loads on any
    layout. ``tokenizer_model`` is the tokenizer's file or folder instead of the one that the checkpoint
    names; its kind is found. ``trust_remote_code`` lets a Hugging Face folder run its code.
    ``overrides`` replace arguments that the checkpoint was made with.

    Returns (model, tokenizer, arguments).

    Raises:
        ValueError: the checkpoint does not say what its model is, or the tokenizer cannot be used.
        CheckpointError: it is damaged, or of another tokenizer.
        FileNotFoundError: there is none.
    """
    saved = read_checkpoint_args(load, iteration)
    if saved is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found")
    args = arguments(saved, load, iteration)
    args.trust_remote_code = trust_remote_code
    vars(args).update(overrides)
    bare = args.tokenizer_type in (None, "NullTokenizer")
    if tokenizer_model and bare:
        found = tokenizer_files.of_path(tokenizer_model)
        args.tokenizer_type, args.tokenizer_model, args.vocab_size = found.kind, str(found.model), None
    elif tokenizer_model:
        args.tokenizer_model = tokenizer_model
    tokenizer = build_tokenizer(args)
    distributed.initialize(args)
    args.padded_vocab_size = None  # as many rows as this layout needs
    settle_vocabulary(args, tokenizer)
    if tokenizer_model and bare:
        args.tokenizer_sha256 = None  # a checkpoint without a tokenizer cannot say which one is its own
    model = build_model(transformer_config(args), args)
    if load_checkpoint(load, model=model, args=args, iteration=iteration) is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found")
    return model[0].eval(), tokenizer, args


def arguments(saved: Namespace, load: str | Path, iteration: int | None = None) -> Namespace:
    """The trainer's defaults with the model and the tokenizer of a checkpoint, for this job and machine.

    Raises ValueError, naming what is missing or wrong, if ``saved`` does not describe a model.
    """
    args = with_defaults(Namespace(), [])
    model_function.take(saved, args, set(), (*saved_args.MODEL, *saved_args.TOKENIZER))
    derive.from_environment(args, None)
    problems = derive.device(args, None)
    args.tensor_model_parallel_size = args.world_size
    args.micro_batch_size = args.global_batch_size = 1
    args.load, args.ckpt_step = str(load), iteration
    derive.before_rules(args)
    problems += validate.problems_of_model(args)
    if problems:
        raise ValueError(f"--load {load}: " + "; ".join(problems))
    derive.after_rules(args)
    return args

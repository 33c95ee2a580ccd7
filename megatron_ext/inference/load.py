"""Loads a model for inference, with the arguments and the tokenizer of its checkpoint."""

from pathlib import Path
from typing import Any

from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint import load_checkpoint, read_checkpoint_args
from megatron_ext.config import RunConfig
from megatron_ext.interchange import tokenizer_files
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.models.gpt_model import PanguModel
from megatron_ext.tokenizer import Tokenizer, build_tokenizer
from megatron_ext.training import distributed


def load_for_inference(
    load: str,
    iteration: int | None = None,
    tokenizer_model: str | None = None,
    trust_remote_code: bool = False,
    layout: tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[PanguModel, Tokenizer, RunConfig]:
    """Build the model that the checkpoint in ``load`` describes and load its weights.

    A checkpoint can be loaded at any layout. ``layout`` is (tensor, pipeline) parallel sizes, and the other
    processes are data parallel; by default all processes are used for tensor parallelism.
    ``tokenizer_model`` is a file or folder to use instead of the tokenizer that the checkpoint names; its
    type is detected. ``trust_remote_code`` lets a Hugging Face folder run its code. ``overrides`` replace
    arguments of the checkpoint.

    Returns (this stage of the model, tokenizer, configuration, whose ``ckpt_step`` is the iteration loaded).

    Raises:
        ValueError: the checkpoint does not describe its model, or the tokenizer cannot be used.
        CheckpointError: the checkpoint is damaged, or of another tokenizer.
        FileNotFoundError: there is no checkpoint.
    """
    saved = read_checkpoint_args(load, iteration)
    if saved is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found")
    try:
        run = arguments_of(saved, load, iteration, layout)
    except ValueError as error:
        raise ValueError(f"--load {load}: {error}") from None
    run.tokenizer.trust_remote_code = trust_remote_code
    run = run.but(**overrides)
    bare = run.tokenizer.tokenizer_type in (None, "NullTokenizer")
    if tokenizer_model and bare:
        files = tokenizer_files.of_path(tokenizer_model)
        if rows := saved.get("padded_vocab_size"):
            tokenizer_files.require_fit(files, rows, Path(load))
        run = run.but(tokenizer_type=files.kind, tokenizer_model=str(files.model), vocab_size=None)
    elif tokenizer_model:
        run.tokenizer.tokenizer_model = tokenizer_model
    tokenizer = build_tokenizer(run.tokenizer)
    distributed.initialize(run)
    run = run.but(padded_vocab_size=None)  # padded for this layout
    settle_vocabulary(run, tokenizer)
    if tokenizer_model and bare:
        run.tokenizer.tokenizer_sha256 = None  # the checkpoint does not identify its tokenizer
    model = build_model(transformer_config(run), run)
    loaded = load_checkpoint(load, model=model, run=run, iteration=iteration)
    if loaded is None:
        raise FileNotFoundError(f"--load {load}: no checkpoint found")
    run.checkpoint.ckpt_step = loaded.iteration
    return model[0].eval(), tokenizer, run

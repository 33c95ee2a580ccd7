"""The rows of the vocabulary, and how many of them are in the softmax of the loss.

The embedding has more rows than tokens, so that it can be divided among devices. Megatron-LM includes the
padding in the softmax, and its size depends on the tensor parallel size: a model's loss then depends on the
layout it was trained at. Here the padding is masked, unless a checkpoint was trained with it.
"""

import dataclasses
import math

from megatron_ext.arguments.from_checkpoint import start_of
from megatron_ext.config import RunConfig
from megatron_ext.config.data import padded
from megatron_ext.tokenizer import Tokenizer


def settle_vocabulary(run: RunConfig, tokenizer: Tokenizer) -> str:
    """Set the vocabulary's rows and the tokenizer's hash in ``run``; returns a line for the log.

    The rows in the softmax are those of the checkpoint that the run starts from, or without one the
    tokenizer's; ``--vocab-padding`` overrides this. Checkpoints that do not state it (Megatron-LM's, and
    older ones of ours) have all rows in the softmax.

    Raises:
        ValueError: --vocab-size or --padded-vocab-size does not fit the tokenizer or the checkpoint, or the
            checkpoint does not say how many rows it has.
    """
    tokens = tokenizer.vocab_size
    where, trained_with = "", None
    if run.checkpoint.load is not None and run.tokenizer.vocab_padding != "masked":
        where, trained_with = _of_checkpoint(run, tokenizer)
    taking_part = max(tokens, trained_with or 0)
    given = run.model.padded_vocab_size
    if given is not None and tokens <= given < taking_part:
        raise ValueError(
            f"--padded-vocab-size {given}: the checkpoint in {where} was trained with {taking_part} rows in "
            "the softmax, padding included; leave the flag out, or add --vocab-padding masked"
        )
    rows = padded_vocab_size(taking_part, run)
    if run.tokenizer.vocab_padding == "in-softmax" and taking_part == tokens:
        taking_part = rows
    run.model = dataclasses.replace(run.model, padded_vocab_size=rows, softmax_vocab_size=taking_part)
    run.tokenizer.tokenizer_sha256 = tokenizer.sha256
    return _line(tokens, taking_part, rows, where if taking_part == trained_with else "")


def _of_checkpoint(run: RunConfig, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """The run's start, and the rows in the softmax there; None without a checkpoint of this tokenizer."""
    where, saved = start_of(run)
    if saved is None or saved.get("tokenizer_sha256") not in (None, tokenizer.sha256):
        return where, None  # the rows belong to another tokenizer
    rows = saved.get("softmax_vocab_size") or saved.get("padded_vocab_size")
    if rows is None and run.tokenizer.vocab_padding is None:
        raise ValueError(
            f"the checkpoint in {where} does not say how many rows its vocabulary has, which take part in "
            "Megatron-LM's softmax; add --vocab-padding in-softmax and --padded-vocab-size, or "
            "--vocab-padding masked"
        )
    return where, rows


def _line(tokens: int, taking_part: int, rows: int, where: str) -> str:
    line = f" vocabulary: {tokens:,} tokens in {rows:,} rows"
    if taking_part > tokens:
        line += f"; {taking_part - tokens:,} rows without a token take part in the softmax"
        line += f", as in the checkpoint in {where}; --vocab-padding masked leaves them out" if where else ""
    return line + ("; padding is masked in the softmax" if rows > taking_part else "")


def padded_vocab_size(true_size: int, run: RunConfig) -> int:
    """Rows of the embedding for a tokenizer of ``true_size`` pieces.

    A multiple of --make-vocab-size-divisible-by, independent of the tensor parallel size: Megatron-LM
    pads to that number times the tensor parallel size, so its checkpoints change shape with the
    layout. If the tensor parallel size does not divide the result, it is padded further to the next multiple
    that it divides. --padded-vocab-size overrides this.

    Raises:
        ValueError: --vocab-size or --padded-vocab-size does not fit the tokenizer.
    """
    parallel, given, flags = (
        run.parallel.tensor_model_parallel_size,
        run.model.padded_vocab_size,
        run.tokenizer,
    )
    most = None if flags.tokenizer_type == "NullTokenizer" else flags.vocab_size
    if most is not None and most < true_size:
        raise ValueError(f"--vocab-size {most}, but the tokenizer has {true_size} pieces")
    if given is not None:
        if given < true_size or given % parallel:
            raise ValueError(
                f"--padded-vocab-size {given} must be at least the tokenizer's {true_size} and divisible by "
                f"--tensor-model-parallel-size {parallel}"
            )
        return given
    unit = flags.make_vocab_size_divisible_by
    if padded(true_size, unit) % parallel:
        unit = math.lcm(unit, parallel)
    return padded(true_size, unit)

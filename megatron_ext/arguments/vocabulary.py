"""Rows of the vocabulary: how many there are, and how many take part in the softmax of the loss.

The embedding has more rows than there are tokens, so that it divides among devices. Megatron-LM lets the
rest take part in the softmax, and pads by the tensor parallel size: a model's loss then depends on the
layout it was trained at. Here the padding is masked, and a checkpoint that was trained with it goes on so.
"""

import math
from argparse import Namespace

from megatron_ext.arguments.from_checkpoint import start_of


def settle_vocabulary(args: Namespace, tokenizer) -> str:
    """Set padded_vocab_size, softmax_vocab_size and tokenizer_sha256 in ``args``; returns a line for the log.

    The rows that take part in the softmax are those that the checkpoint which the run starts from was
    trained with, else the tokenizer's; ``--vocab-padding`` says otherwise. All rows of a checkpoint take
    part that does not say it: Megatron-LM's, and ours of before padding was masked.

    Raises:
        ValueError: --vocab-size or --padded-vocab-size does not fit the tokenizer or the checkpoint, or the
            checkpoint does not say how many rows it has.
    """
    tokens = tokenizer.vocab_size
    where, trained_with = "", None
    if args.load is not None and args.vocab_padding != "masked":
        where, trained_with = _of_checkpoint(args, tokenizer)
    taking_part = max(tokens, trained_with or 0)
    given = args.padded_vocab_size
    if given is not None and tokens <= given < taking_part:
        raise ValueError(
            f"--padded-vocab-size {given}: the checkpoint in {where} was trained with {taking_part} rows in "
            "the softmax, padding included; leave the flag out, or add --vocab-padding masked"
        )
    args.padded_vocab_size = padded_vocab_size(taking_part, args)
    if args.vocab_padding == "in-softmax" and taking_part == tokens:
        taking_part = args.padded_vocab_size
    args.softmax_vocab_size, args.tokenizer_sha256 = taking_part, tokenizer.sha256
    return _line(args, tokens, where if taking_part == trained_with else "")


def _of_checkpoint(args: Namespace, tokenizer) -> tuple[str, int | None]:
    """Where the run starts, and the rows in the softmax there; None without a checkpoint of these tokens."""
    where, saved = start_of(args)
    if saved is None or getattr(saved, "tokenizer_sha256", None) not in (None, tokenizer.sha256):
        return where, None  # the rows of another tokenizer are other tokens'
    rows = getattr(saved, "softmax_vocab_size", None) or getattr(saved, "padded_vocab_size", None)
    if rows is None and args.vocab_padding is None:
        raise ValueError(
            f"the checkpoint in {where} does not say how many rows its vocabulary has, which take part in "
            "Megatron-LM's softmax; add --vocab-padding in-softmax and --padded-vocab-size, or "
            "--vocab-padding masked"
        )
    return where, rows


def _line(args: Namespace, tokens: int, where: str) -> str:
    rows, taking_part = args.padded_vocab_size, args.softmax_vocab_size
    line = f" vocabulary: {tokens:,} tokens in {rows:,} rows"
    if taking_part > tokens:
        line += f"; {taking_part - tokens:,} rows without a token take part in the softmax"
        line += f", as in the checkpoint in {where}; --vocab-padding masked leaves them out" if where else ""
    return line + ("; padding is masked in the softmax" if rows > taking_part else "")


def padded_vocab_size(true_size: int, args: Namespace) -> int:
    """Rows of the embedding for a tokenizer of ``true_size`` pieces.

    A multiple of --make-vocab-size-divisible-by, the same at every tensor parallel size: Megatron-LM
    pads to that number times the tensor parallel size, so its checkpoints change shape with the
    layout. Only a tensor parallel size that does not divide the result pads further, to the least
    multiple that it divides. --padded-vocab-size wins.

    Raises:
        ValueError: --vocab-size or --padded-vocab-size does not fit the tokenizer.
    """
    parallel = args.tensor_model_parallel_size
    if args.vocab_size is not None and args.tokenizer_type != "NullTokenizer" and args.vocab_size < true_size:
        raise ValueError(f"--vocab-size {args.vocab_size}, but the tokenizer has {true_size} pieces")
    if args.padded_vocab_size is not None:
        if args.padded_vocab_size < true_size or args.padded_vocab_size % parallel:
            raise ValueError(
                f"--padded-vocab-size {args.padded_vocab_size} must be at least the tokenizer's {true_size} "
                f"and divisible by --tensor-model-parallel-size {parallel}"
            )
        return args.padded_vocab_size
    unit = args.make_vocab_size_divisible_by
    if -(-true_size // unit) * unit % parallel:
        unit = math.lcm(unit, parallel)
    return -(-true_size // unit) * unit

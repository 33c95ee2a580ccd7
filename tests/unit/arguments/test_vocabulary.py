"""Rows of the vocabulary, and how many take part in the softmax: flags, tokenizer and checkpoint."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint.saved_args import arguments_of
from tests.unit.config.test_model_function import checkpoint

RUN = """--model-preset tiny --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --micro-batch-size 1
    --train-iters 1 --lr 1e-3"""
TOKENIZER = Namespace(vocab_size=257, sha256="a" * 64)


def settled(flags: str = "", parallel: int = 1, tokenizer: Namespace = TOKENIZER) -> tuple[int, int, str]:
    """(rows, rows in the softmax, the line for the log)"""
    flags = f"{RUN} --tensor-model-parallel-size {parallel} {flags}"
    run = read_args(flags.split(), world_size=parallel, device="cpu")
    line = settle_vocabulary(run, tokenizer)
    assert run.tokenizer.tokenizer_sha256 == tokenizer.sha256
    return run.model.padded_vocab_size, run.model.softmax_vocab_size, line


def saved(folder: Path, **values) -> str:
    """The flag that loads a checkpoint whose args say ``values`` of the vocabulary."""
    model = vars(arguments_of(read_args(RUN.split(), world_size=1, device="cpu")))
    del model["padded_vocab_size"]
    return f"--load {checkpoint(folder, Namespace(**model | values))}"


@pytest.mark.parametrize(
    ("flags", "parallel", "rows", "taking_part"),
    [
        ("", 1, 384, 257),
        ("", 4, 384, 257),
        ("--make-vocab-size-divisible-by 1", 1, 257, 257),
        ("--make-vocab-size-divisible-by 1", 4, 260, 257),
        ("--padded-vocab-size 512", 2, 512, 257),
        ("--vocab-padding in-softmax", 1, 384, 384),
        ("--vocab-padding in-softmax --make-vocab-size-divisible-by 512", 1, 512, 512),
        ("--vocab-padding masked", 1, 384, 257),
    ],
)
def test_a_new_run(flags, parallel, rows, taking_part):
    assert settled(flags, parallel)[:2] == (rows, taking_part)


@pytest.mark.parametrize(
    ("values", "flags", "parallel", "rows", "taking_part"),
    [
        # Megatron-LM's, and ours of before padding was masked: all rows that it has, at any layout
        (dict(padded_vocab_size=512), "", 1, 512, 512),
        (dict(padded_vocab_size=510), "", 4, 512, 510),
        (dict(padded_vocab_size=512), "--make-vocab-size-divisible-by 1024", 1, 1024, 512),
        (dict(padded_vocab_size=512), "--vocab-padding masked", 1, 384, 257),
        (dict(padded_vocab_size=512), "--vocab-padding in-softmax", 1, 512, 512),
        (dict(padded_vocab_size=384), "--padded-vocab-size 640", 1, 640, 384),
        (dict(padded_vocab_size=257), "", 1, 384, 257),
        # ours: as it was trained
        (dict(padded_vocab_size=512, softmax_vocab_size=257), "", 1, 384, 257),
        (dict(padded_vocab_size=512, softmax_vocab_size=512), "", 1, 512, 512),
        (dict(padded_vocab_size=512, softmax_vocab_size=300), "", 1, 384, 300),
        (dict(padded_vocab_size=512, softmax_vocab_size=257), "--vocab-padding in-softmax", 1, 384, 384),
        # of another tokenizer, its rows are other tokens'
        (dict(padded_vocab_size=512, tokenizer_sha256="b" * 64), "--finetune", 1, 384, 257),
        (dict(padded_vocab_size=512, tokenizer_sha256="a" * 64), "--finetune", 1, 512, 512),
    ],
)
def test_a_run_that_starts_from_a_checkpoint(tmp_path, values, flags, parallel, rows, taking_part):
    flags = f"{saved(tmp_path, **values)} {flags}"
    assert settled(flags, parallel)[:2] == (rows, taking_part)
    assert settled(f"--load {tmp_path}/none --pretrained-checkpoint {flags[7:]}", parallel)[1] == taking_part


def test_the_log_says_which_is_in_force(tmp_path):
    assert settled()[2] == " vocabulary: 257 tokens in 384 rows; padding is masked in the softmax"
    assert settled("--make-vocab-size-divisible-by 1")[2] == " vocabulary: 257 tokens in 257 rows"
    assert settled("--vocab-padding in-softmax")[2].endswith(
        "257 tokens in 384 rows; 127 rows without a token take part in the softmax"
    )
    line = settled(saved(tmp_path, padded_vocab_size=510), 4)[2]
    assert line.endswith(
        f"257 tokens in 512 rows; 253 rows without a token take part in the softmax, as in the checkpoint in "
        f"--load {tmp_path}; --vocab-padding masked leaves them out; padding is masked in the softmax"
    )


def test_fewer_rows_than_took_part_are_refused(tmp_path):
    flags = saved(tmp_path, padded_vocab_size=512)
    with pytest.raises(ValueError, match="384: the checkpoint in --load .* was trained with 512 rows in the"):
        settled(f"{flags} --padded-vocab-size 384")
    assert settled(f"{flags} --padded-vocab-size 384 --vocab-padding masked")[:2] == (384, 257)


def test_a_checkpoint_that_does_not_say_its_rows(tmp_path):
    flags = saved(tmp_path)
    with pytest.raises(ValueError, match="does not say how many rows .* add --vocab-padding in-softmax and"):
        settled(flags)
    assert settled(f"{flags} --vocab-padding masked")[1] == 257
    assert settled(f"{flags} --vocab-padding in-softmax --padded-vocab-size 512")[1] == 512

"""Defaults, presets and flags on the command line; and what is refused."""

import pytest

from megatron_ext.arguments import parse_args
from megatron_ext.arguments.parser import CommandLineError, make_parser, read_args

RUN = "--mock-data --tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 --train-iters 10"
TINY = f"--model-preset tiny {RUN} --micro-batch-size 2"


def read(line: str, world_size: int = 1, device: str = "cpu"):
    return read_args(line.split(), world_size=world_size, device=device)


def problems_of(line: str, **keywords) -> list[str]:
    with pytest.raises(CommandLineError) as caught:
        read(line, **keywords)
    return caught.value.problems


def test_preset_sets_the_shape_and_a_typed_flag_wins():
    run = read(f"{TINY} --num-layers 4 --hidden-dropout 0.5")
    assert (run.model.hidden_size, run.model.swiglu, run.model.normalization) == (128, True, "RMSNorm")
    assert (run.model.series_activation_order, run.model.augmented_shortcuts) == (2, 1)
    assert (run.model.num_layers, run.layers.hidden_dropout) == (4, 0.5)


def test_pangu_modules_are_switched_off_with_zero():
    run = read(f"{TINY} --series-activation-order 0 --augmented-shortcuts 0")
    assert (run.model.series_activation_order, run.model.augmented_shortcuts) == (0, 0)


def test_longer_sequences_lengthen_the_presets_positions():
    assert read(f"{TINY} --seq-length 1024").model.max_position_embeddings == 1024
    assert problems_of(f"{TINY} --seq-length 1024 --max-position-embeddings 512")


def test_parsing_twice_gives_independent_lists():
    first = read(TINY)
    first.training.iterations_to_skip.append(3)
    assert read(TINY).training.iterations_to_skip == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num-layer 3", "--num-layer is not a flag of this program; did you mean --num-layers?"),
        ("--hiden-size=3", "did you mean --hidden-size?"),
        ("--num-experts 8", "--num-experts is known to Megatron-LM 0.16.1 but not supported here"),
        ("--batch-size 8", "use --micro-batch-size"),
        ("--zzqqxx", "--zzqqxx is not a flag of this program"),
        ("--model-preset tinny", "there is no such preset; choose pangu-pi-1b"),
        ("--device cpu x", "'x' belongs to no flag"),
    ],
)
def test_what_is_not_understood_is_refused(flags, expected):
    (problem,) = problems_of(f"{TINY.replace('--model-preset tiny', '')} --model-preset tiny {flags}")
    assert expected in problem


def test_a_flag_and_its_value_in_one_word_is_explained():
    with pytest.raises(CommandLineError) as caught:
        read_args([*TINY.split(), "--split 99,1,0"], world_size=1, device="cpu")
    assert "did you mean --split?" in str(caught.value)


def test_all_problems_are_reported_together():
    line = f"{TINY} --tensor-model-parallel-size 3 --num-exprts 3 --min-lr 1 --save-interval 3 --bf16 --fp16"
    text = "\n".join(problems_of(line, world_size=2))
    for part in (
        "--num-exprts",
        "--num-attention-heads",
        "--min-lr",
        "--save-interval",
        "--bf16",
        "2 processes",
    ):
        assert part in text


def test_leaves_with_2_and_one_report(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as left:
        parse_args(f"{TINY} --bf16 --fp16 --num-exprts 1".split(), world_size=1, device="cpu")
    assert left.value.code == 2
    report = capsys.readouterr().err
    assert report.startswith("pretrain_pangu_pro.py: 3 problems")
    assert report.count("\n  - ") == 3


def test_a_value_of_the_wrong_type_names_the_flag():
    assert problems_of(f"{TINY} --seed x") == ["argument --seed: invalid int value: 'x'"]
    assert "is not a signal" in problems_of(f"{TINY} --exit-signal SIGNOPE")[0]


def test_help_has_a_section_for_each_group_and_no_blank_help():
    text = make_parser().format_help()
    for title in ("model:", "parallelism:", "checkpoints:", "learning rate:"):
        assert f"\n{title}" in text
    for action in make_parser()._actions:
        assert action.help


def test_warnings_name_what_was_changed(capsys):
    run = read(f"{TINY} --sequence-parallel")
    assert run.parallel.sequence_parallel is False
    assert "--sequence-parallel is off" in capsys.readouterr().err

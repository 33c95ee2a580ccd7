"""Data in stages on the command line: where stages begin and end, rules, what planning says of them."""

import json

import pytest

from megatron_ext.arguments.parser import read_args
from megatron_ext.arguments.stages import Point, plan_of_run, planned
from megatron_ext.data.stages import read_stages
from tests.unit.arguments.test_validate import problems_of
from tests.unit.data import corpora
from tests.unit.tools.test_plan_run import plan, plan_run

RUN = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 64 "
    "--position-embedding-type rope --tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 "
    "--micro-batch-size 2 --global-batch-size 8"
)


@pytest.fixture
def line(tmp_path):
    """A command line with stages; their datasets lie in tmp_path."""
    for i, name in enumerate("ab"):
        corpora.make_dataset(tmp_path / name, [40] * 10, vocabulary=99, seed=i)

    def written(*stages: dict, flags: str = "--train-iters 10") -> str:
        entries = [{"blend": str(tmp_path / "a")} | stage for stage in stages]
        (tmp_path / "stages.json").write_text(json.dumps(entries))
        return f"{RUN} --data-stages {tmp_path}/stages.json {flags}"

    return written


def points(line: str) -> list[tuple]:
    run = read_args(line.split(), world_size=1, device="cpu")
    return [(each.begin, each.end, each.samples, each.tokens) for each in plan_of_run(run)]


def test_stages_begin_with_an_iteration(line):
    found = points(line({}, {"from_iteration": 4}, {"from_sample": 57, "seq_length": 16}))
    assert found == [
        ((0, 0), (4, 32), 32, 32 * 32),
        ((4, 32), (8, 64), 32, 32 * 32),
        ((8, 64), (10, 80), 16, 16 * 16),  # the first iteration after 57 samples
    ]


def test_the_batch_may_grow(line):
    """4 samples a step to 12, then 8: the loop counts the same (test_stages.py of tests/functional)."""
    ramp = "--train-samples 40 --rampup-batch-size 4 4 12"
    found = points(line({}, {"from_sample": 10}, {"from_iteration": 5}, flags=ramp))
    assert [begin for begin, *_ in found] == [(0, 0), (3, 12), (5, 28)]
    assert found[-1][1] == (6, 36)


def test_a_resumed_run_counts_from_where_it_is(line):
    run = read_args(line({}, {"from_iteration": 4}).split(), world_size=1, device="cpu")
    stages = read_stages(run.data.data_stages)
    found = planned(stages, run.but(global_batch_size=16), Point(2, 16))
    assert [each.begin for each in found] == [(2, 0), (4, 48)] and found[-1].end == (10, 144)


BROKEN = [
    ([{}, {"from_iteration": 4}, {"from_iteration": 4}], "", "stage 2: it would begin at iteration 4, and"),
    ([{}, {"from_iteration": 10}], "", "stage 2: it would begin at iteration 10"),
    ([{}, {"from_sample": 4, "blend": "nowhere"}], "", "stage 2: nowhere: there is no nowhere.bin"),
    ([{"blend": 3}], "", "stage 1: blend: must be words"),
    ([{"blend": [{"prefix": "a", "tokens": 9}]}], "", "add up to 9, and the stage has 2,560"),
    ([{"seq_length": 80}], "", "stage 1: --max-position-embeddings 64 must be at least --seq-length 80"),
    ([{}], "--mock-data", "--mock-data and --data-stages exclude each other"),
    ([{}], "--train-data-path x", "--data-stages and --train-data-path exclude each other"),
    ([{}], "--dataloader-type cyclic", "--data-stages does not go with --dataloader-type cyclic"),
    ([{}], "--record-sample-loss x", "--data-stages does not go with --record-sample-loss"),
    ([{}], "--teacher-logits x", "--data-stages does not go with --teacher-logits"),
    ([{}], "--record-teacher-logits x", "--data-stages does not go with --record-teacher-logits"),
    ([{}], "--round-index x", "--data-stages does not go with --round-index"),
    ([{}], "--valid-data-path x --split 9,1,0", "--split cannot take effect"),
]


@pytest.mark.parametrize(("stages", "flags", "expected"), BROKEN)
def test_what_does_not_go_is_said(line, stages, flags, expected):
    assert expected in "\n".join(problems_of(line(*stages) + " " + flags))


def test_all_problems_at_once(line):
    found = problems_of(line({"seq_length": 80, "blend": "none"}, {"from_sample": -1}))
    for part in ("from_sample: must be", "stage 1: --max-position-embeddings 64", "there is no none.bin"):
        assert part in "\n".join(found)


def test_lengths_that_a_layout_cannot_divide(line):
    flags = "--train-iters 10 --tensor-model-parallel-size 2 --sequence-parallel"
    (problem,) = problems_of(line({}, {"from_sample": 8, "seq_length": 33}, flags=flags), 2, "cpu")
    assert "stage 2: --sequence-parallel: --seq-length 33" in problem


def test_the_plan_says_what_is_read_of_each_source(line, tmp_path, capsys):
    a, b = (str(tmp_path / name) for name in "ab")
    mix = [{"prefix": a, "weight": 1}, {"prefix": b, "tokens": 512}]
    flags = line(
        {}, {"from_iteration": 4, "seq_length": 64, "blend": mix}, flags="--train-iters 8 --split 50,50,0"
    )
    _, summary = plan(capsys, "--machine", "cpu", flags=flags.split())
    assert [stage["tokens"] for stage in summary["stages"]] == [1024, 2048]
    assert summary["tokens"] == 3072
    assert summary["sources"][a] == {"tokens": 1024 + 1536, "epochs": pytest.approx(2560 / 200)}
    assert summary["sources"][b] == {"tokens": 512, "epochs": pytest.approx(512 / 200)}
    longest, _ = plan(
        capsys, "--machine", "cpu", flags=f"{RUN} --mock-data --train-iters 8 --seq-length 64".split()
    )
    assert longest == 0
    plan_run.main(["--machine", "cpu", "--", *flags.split()])
    text = capsys.readouterr().out
    assert "stage 2, iterations 5 to 8: 32 samples of 64 tokens" in text and "12.8 epochs" in text


def test_memory_is_that_of_the_longest(line, capsys):
    _, found = plan(
        capsys, "--machine", "cpu", flags=line({}, {"from_iteration": 4, "seq_length": 64}).split()
    )
    whole = f"{RUN} --mock-data --train-iters 10 --seq-length 64".split()
    assert found["memory_bytes"] == plan(capsys, "--machine", "cpu", flags=whole)[1]["memory_bytes"]


def test_a_blend_is_planned_as_one_stage(line, tmp_path, capsys):
    a, b = (str(tmp_path / name) for name in "ab")
    flags = f"{RUN} --train-iters 10 --data-path 3 {a} 1 {b} --split 50,50,0".split()
    _, summary = plan(capsys, "--machine", "cpu", flags=flags)
    assert summary["sources"][b] == {"tokens": 640, "epochs": pytest.approx(3.2)}

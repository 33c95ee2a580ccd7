"""Data in stages: what is read, exact resumption around every boundary, and what may change."""

import contextlib
import io
import json
import random
import shutil
from itertools import pairwise

import pytest

from megatron_ext.arguments import parse_args
from megatron_ext.data import build_datasets
from megatron_ext.tokenizer import build_tokenizer
from tests.functional.test_continuing import samples_of, steps
from tests.functional.test_rounds import refusal
from tests.functional.test_run import BASE
from tests.helpers.faults import Fuse, facts, fused_run, killed, newest_whole, steps_in
from tests.helpers.training import _pretrain, flags, losses, pretrain, validation
from tests.unit.data import corpora

LENGTHS = [40, 90, 33, 60, 17, 80] * 4
ITERATIONS, BOUNDARIES, SEQUENCES = 9, (3, 6), (32, 16, 48)
#: 24 samples of 48 tokens in the last stage, of which a third are of "c".
NAMES, MIX = ("web", "more", "annealing"), 24 * 48 // 3


@pytest.fixture
def data(tmp_path):
    """The flags of a run with warm-up, a stable rate and decay, and a function that writes its stages."""
    a, b, c = (str(corpora.make_dataset(tmp_path / name, LENGTHS, seed=i)) for i, name in enumerate("abc"))

    def write(*changes: dict) -> str:
        stages = [
            {"name": "web", "blend": ["0.7", a, "0.3", b]},
            {"name": "more", "from_iteration": 3, "blend": b, "seq_length": 16},
            {"name": "annealing", "from_sample": 45, "seq_length": 48,
             "blend": [{"prefix": a, "weight": 1}, {"prefix": c, "tokens": MIX}]},
        ]  # fmt: skip
        stages = [stage | change for stage, change in zip(stages, changes or ({},) * 3, strict=True)]
        (tmp_path / "stages.json").write_text(json.dumps([stage for stage in stages if "left" not in stage]))
        return str(tmp_path / "stages.json")

    values = BASE | dict(
        mock_data=None, data_stages=write(), split="80,20,0", data_cache_path=tmp_path / "cache",
        train_iters=None, train_samples=8 * ITERATIONS, global_batch_size=8, attention_dropout=0.1,
        hidden_dropout=0.1, lr_decay_style="WSD", lr_wsd_decay_samples=24, lr_wsd_decay_style="linear",
        lr_warmup_samples=8, eval_interval=1,
    )  # fmt: skip
    return values, write


def read(values: dict, sizes: tuple, **changes) -> list:
    run = parse_args(flags(**values | changes), world_size=1)
    return build_datasets(run, build_tokenizer(run.tokenizer), sizes)


def test_each_stage_reads_its_own_samples_at_its_length(pool, data, tmp_path):
    """Those that a run of this stage alone would begin with; validation is on the stage's held-out part."""
    values, _ = data
    a, b, c = (str(tmp_path / name) for name in "abc")
    plain = values | dict(data_stages=None)
    blends = (["0.7", a, "0.3", b], [b], [str(2 / 3), a, str(1 / 3), c])
    wanted = []
    for blend, length in zip(blends, SEQUENCES, strict=True):
        train = read(plain, (24, 0, 0), data_path=blend, seq_length=length, max_position_embeddings=64)[0]
        wanted += [tuple(train[i]["tokens"].tolist()) for i in range(24)]
    seen = samples_of(pool, values | dict(eval_iters=0, eval_interval=None, num_workers=1), tmp_path)
    assert seen == wanted
    records = pretrain(pool, 1, flags(**values))
    assert [step["consumed_tokens"] for step in steps(records)] == [
        8 * sum(SEQUENCES[i // 3] for i in range(n)) for n in range(1, ITERATIONS + 1)
    ]
    assert [step["stage"] for step in steps(records)] == [NAMES[i // 3] for i in range(ITERATIONS)]
    held_out = [record for record in records if record.get("split") == "validation"]
    assert [record["stage"] for record in held_out] == [NAMES[i // 3] for i in range(ITERATIONS)]


def test_a_run_in_stages_is_the_runs_one_after_the_other(pool, data, tmp_path):
    """The same as by hand: each as long as its stage, the later ones with other data from their beginning."""
    values, _ = data
    a, b, c = (str(tmp_path / name) for name in "abc")
    in_stages = losses(pretrain(pool, 1, flags(**values)))
    blends = (["0.7", a, "0.3", b], [b], [str(2 / 3), a, str(1 / 3), c])
    by_hand = []
    for blend, length, end in zip(blends, SEQUENCES, (*BOUNDARIES, ITERATIONS), strict=True):
        more = dict(load=tmp_path / "run", override_training_set=True) if by_hand else {}
        changes = dict(
            data_stages=None, data_path=blend, seq_length=length, train_samples=8 * end,
            lr_decay_samples=8 * ITERATIONS, save=tmp_path / "run", save_interval=100, **more,
        )  # fmt: skip
        by_hand += losses(pretrain(pool, 1, flags(**values | changes)))
    assert in_stages == by_hand and len(by_hand) == ITERATIONS


#: name -> processes, flags, iterations around a boundary in which a rank is killed
JOBS = {
    "one": (1, dict(), (-1, 0, 1)),
    "pp2": (2, dict(pipeline_model_parallel_size=2, async_save=True), (0,)),
}


@pytest.mark.parametrize("job", JOBS)
def test_killed_around_each_boundary_it_resumes_to_the_same_trace(pool, data, tmp_path, job):
    """SIGKILL of a rank at a random change of the disk in the save before, at and after each boundary."""
    values, _ = data
    processes, changes, around = JOBS[job]
    values |= changes | dict(save_interval=1)

    def argv(name: str) -> list[str]:
        return flags(
            **values, save=tmp_path / name, load=tmp_path / name, metrics_file=tmp_path / f"{name}.jsonl"
        )

    pool.run(processes, fused_run, argv("whole"), None)
    trace = {step["iteration"]: facts(step) for step in steps_in(tmp_path / "whole.jsonl")}
    held_out = validation(records(tmp_path / "whole.jsonl"))
    rng, kills = random.Random(job), 0
    for boundary in BOUNDARIES:
        name = f"run{boundary}"
        for iteration in (boundary + distance for distance in around):
            done = newest_whole(tmp_path / name) or 0 if (tmp_path / name).exists() else 0
            number = 14 * max(0, iteration - 1 - done) + rng.randint(1, 14)
            fuse = Fuse(0, str(tmp_path / name), number)
            through = killed(pool, processes, argv(name), fuse)
            kills += through is not None
        pool.run(processes, fused_run, argv(name), None)
        found = steps_in(tmp_path / f"{name}.jsonl")
        assert {step["iteration"] for step in found} == set(trace)
        assert all(facts(step) == trace[step["iteration"]] for step in found)
        assert validation(records(tmp_path / f"{name}.jsonl"))["lm_loss"] == held_out["lm_loss"]
        shutil.rmtree(tmp_path / name)
    assert kills == len(BOUNDARIES) * len(around)


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def test_resumed_at_every_iteration_and_on_another_layout(pool, data, tmp_path):
    values, _ = data
    values |= dict(attention_dropout=0.0, hidden_dropout=0.0)
    whole = losses(pretrain(pool, 1, flags(**values, save=tmp_path / "run", save_interval=1)))
    for iteration in (2, 3, 4, 6):
        layout = (2, dict(use_distributed_optimizer=True)) if iteration == 3 else (1, {})
        goes_on = flags(**values, load=tmp_path / "run", ckpt_step=iteration, **layout[1])
        resumed = losses(pretrain(pool, layout[0], goes_on))
        assert resumed == pytest.approx(whole[iteration:], rel=0 if layout[0] == 1 else 2e-5)
    evaluated = pretrain(pool, 1, flags(**values, load=tmp_path / "run", ckpt_step=4, skip_train=True))
    assert [record.get("stage") for record in evaluated] == ["more"]


def printed(argv: list[str]) -> str:
    """What a run says."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        _pretrain(argv)
    return text.getvalue()


def test_the_past_is_kept_and_the_future_may_change(pool, data, tmp_path):
    values, write = data
    values |= dict(eval_iters=0, eval_interval=None)
    stop = dict(save=tmp_path / "run", save_interval=100, exit_interval=5)
    begun = pretrain(pool, 1, flags(**values | stop))
    goes_on = values | dict(load=tmp_path / "run")
    for changes, message in (
        (({"seq_length": 48}, {}, {}), "stage web: seq_length: None there, 48 here"),
        (({}, {"from_iteration": 2}, {}), "stage more: from_iteration: 3 there, 2 here"),
        (({}, {"blend": str(tmp_path / "c")}, {}), "stage more: blend:"),
        (({}, {}, {"from_sample": 25}), "stage annealing would have begun before iteration 5"),
        (({}, {"left": True}, {"left": True}), "it is in stage 2, and there are 1 here"),
    ):
        write(*changes)
        text = refusal(pool, flags(**goes_on))
        assert message in text and "Only those that have not begun may change" in text
    other = dict(data_stages=None, data_path=tmp_path / "a")
    assert "is in stage 2 of its --data-stages" in refusal(pool, flags(**goes_on | other))
    # Another future: the last stage begins an iteration later, the samples of this one go on.
    write({}, {}, {"from_sample": 56, "blend": str(tmp_path / "c")})
    longer = pretrain(pool, 1, flags(**goes_on))
    [said] = pool.run(1, printed, flags(**goes_on))
    assert "the stages after more differ from those of the checkpoint" in said
    assert "data stage annealing (3 of 3) to iteration 9: 1 c, sequences of 48" in said
    assert [step["stage"] for step in steps(begun + longer)] == ["web"] * 3 + ["more"] * 4 + ["annealing"] * 2


def test_a_run_with_one_blend_gets_stages_later(pool, data, tmp_path):
    """The usual case: a stable phase of no planned length, annealed when one wants to."""
    values, write = data
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    first = dict(data_stages=None, data_path=["0.7", a, "0.3", b], exit_interval=3)
    begun = losses(pretrain(pool, 1, flags(**values | first, save=tmp_path / "run", save_interval=100)))
    rest = pretrain(pool, 1, flags(**values | dict(load=tmp_path / "run")))
    assert [step["stage"] for step in steps(rest)] == ["more"] * 3 + ["annealing"] * 3
    assert len(begun) == 3 and all(one != other for one, other in pairwise(losses(rest)))
    write({"blend": a}, {}, {})
    assert "another training set" in refusal(pool, flags(**values | dict(load=tmp_path / "run")))


def test_a_teacher_follows_the_stages(pool, data, tmp_path):
    """Its sequences change with the student's; a model that learns from itself alone has no gradient."""
    values, _ = data
    values |= dict(eval_iters=0, eval_interval=None, attention_dropout=0.0, hidden_dropout=0.0)
    one_step = dict(save=tmp_path / "run", save_interval=100, exit_interval=1)
    pretrain(pool, 1, flags(**values | one_step))
    taught = values | dict(
        teacher_load=tmp_path / "run", distillation_alpha=1.0, pretrained_checkpoint=tmp_path / "run",
        load=tmp_path / "none", pipeline_model_parallel_size=2, lr=1e-12, min_lr=0.0,
    )  # fmt: skip
    found = steps(pretrain(pool, 2, flags(**taught)))
    assert [step["consumed_tokens"] for step in found][-1] == 8 * 3 * sum(SEQUENCES)
    assert all(step["grad_norm"] < 1e-4 for step in found)

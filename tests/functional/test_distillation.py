"""Runs with a teacher: resumed, without its share, taught by itself, and what is refused."""

import json
import re

import pytest
import torch

from tests.functional.test_run import BASE, run
from tests.helpers.pool import WorkerError
from tests.helpers.teachers import TEACHER, of_two_vocabularies
from tests.helpers.training import _pretrain, flags, losses, validation


def steps(records: list[dict]) -> list[tuple[float, float, float]]:
    """Cross entropy, divergence and gradient norm of every iteration."""
    found = [record for record in records if "split" not in record]
    return [(r["lm_loss"], r.get("distillation_loss"), r["grad_norm"]) for r in found]


@pytest.fixture(scope="module")
def teacher(pool, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("teacher")
    run(pool, **TEACHER, save=folder, save_interval=6)
    return dict(teacher_load=folder)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, {}), (2, {"pipeline_model_parallel_size": 2, "distillation_top_k": 8})],
    ids=["1p", "pp2-top-8"],
)
def test_resumed_is_uninterrupted(pool, teacher, tmp_path, processes, layout):
    """Bit for bit, with dropout, a share that falls, and an iteration that is skipped."""
    values = layout | teacher | dict(
        distillation_alpha_decay_style="linear", distillation_temperature=2.0, attention_dropout=0.1,
        hidden_dropout=0.1, iterations_to_skip=[5],
    )  # fmt: skip
    whole = run(pool, processes, **values, save=tmp_path, save_interval=3)
    shares = [record["distillation_alpha"] for record in whole if "split" not in record]
    assert shares == [0.5, 0.5 * (1 - 1 / 6), 0.5 * (1 - 2 / 6), 0.5 * (1 - 3 / 6), 0.0, 0.5 * (1 - 5 / 6)]
    resumed = run(pool, processes, **values, load=tmp_path, ckpt_step=3)
    assert steps(resumed) == steps(whole)[3:]
    assert validation(resumed) == validation(whole)


def test_without_its_share_the_run_is_the_plain_one(pool, teacher):
    plain = run(pool)
    taught = run(pool, **teacher, distillation_alpha=0.0)
    assert steps(taught) == steps(plain)
    assert validation(taught) == validation(plain)
    with_share = run(pool, **teacher)
    assert losses(with_share)[0] == losses(plain)[0] and losses(with_share)[1] != losses(plain)[1]


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["1p", "tp2"])
def test_a_student_that_is_its_own_teacher(pool, tmp_path, layout):
    """Diverges from it by nothing, until it has learned something else."""
    run(pool, save=tmp_path, save_interval=6, min_lr=1e-2)
    same = dict(load=tmp_path, finetune=True, teacher_load=tmp_path, distillation_temperature=2.0)
    found = [divergence for _, divergence, _ in steps(run(pool, len(layout) + 1, **same, **layout))]
    assert abs(found[0]) < 1e-6 and found[1] > 1e-5


def test_bf16_and_recomputation(pool, teacher):
    """Taught in bf16 a student learns as in fp32, to bf16's digits; recomputation changes nothing."""
    wide = steps(run(pool, **teacher))
    half = run(pool, 2, **teacher, bf16=True, use_distributed_optimizer=True, recompute_granularity="full",
               recompute_method="uniform", recompute_num_layers=1)  # fmt: skip
    assert steps(half)[0] == pytest.approx(wide[0], rel=2e-2)
    again = run(
        pool, **teacher, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    assert steps(again) == wide


def test_a_teacher_of_another_vocabulary_recorded_samples_and_ramp_up(pool, tmp_path):
    theirs, mine = of_two_vocabularies(tmp_path)
    run(pool, **TEACHER | theirs, save=tmp_path / "teacher", save_interval=6, eval_iters=0)
    values = mine | dict(
        teacher_load=tmp_path / "teacher", eval_iters=0, train_iters=None, train_samples=40,
        rampup_batch_size=[4, 4, 16], record_mode="online",
    )  # fmt: skip
    one = steps(run(pool, **values, record_sample_loss=tmp_path / "one.npy"))
    two = steps(
        run(pool, 2, **values, record_sample_loss=tmp_path / "two.npy", pipeline_model_parallel_size=2)
    )
    assert len(one) > 5
    for here, there in zip(one, two, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def _with_a_teacher_that_fails_once(argv: list[str]) -> None:
    from megatron_ext.models.teacher import TeacherModel

    calls, predict = [], TeacherModel.predict

    def once(self, *args):
        targets = predict(self, *args)
        calls.append(1)
        if len(calls) == 7:  # of four micro batches a step
            targets.logits[0] = torch.nan
        return targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherModel, "predict", once)
        _pretrain(argv)


def test_a_teacher_that_predicts_nan_makes_a_bad_iteration(pool, teacher, tmp_path):
    """Whose update is skipped if that was asked for; the loss itself is in order."""
    metrics = tmp_path / "metrics.jsonl"
    values = BASE | teacher | dict(skip_bad_iterations=1, metrics_file=metrics, eval_iters=0)
    pool.run(1, _with_a_teacher_that_fails_once, flags(**values))
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["skipped"] for record in records] == [False, True, False, False, False, False]


BAD = [
    (dict(distillation_alpha=0.3), "--distillation-alpha cannot take effect: needs --teacher-load"),
    (dict(teacher_load="x", distillation_alpha=1.5), "--distillation-alpha 1.5: must be between 0 and 1"),
    (dict(teacher_load="x", distillation_temperature=0), "--distillation-temperature 0.0: must be above 0"),
    (dict(teacher_load="x", skip_train=True), "leave out --skip-train"),
    (dict(teacher_load="nowhere"), "could not use --teacher-load nowhere: no checkpoint found"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_what_cannot_be_is_refused(pool, capfd, changes, words):
    with pytest.raises(WorkerError) as error:
        run(pool, **changes)
    assert words in str(error.value) + capfd.readouterr().err


def test_a_teacher_that_does_not_fit_is_refused(pool, teacher, tmp_path, capfd):
    """By name: its layers, its heads, its positions, its tokenizer."""
    for processes, changes, words in (
        (3, dict(pipeline_model_parallel_size=3, num_layers=3), "--num-layers 4 is not divisible by"),
        (4, dict(tensor_model_parallel_size=4), "--num-attention-heads 6 is not divisible by"),
        (1, dict(seq_length=128, max_position_embeddings=128),
         "--max-position-embeddings 64 must be at least --seq-length 128"),
        (1, dict(vocab_size=127), "the student's tokenizer is not the teacher's"),
        (2, dict(pipeline_model_parallel_size=2, num_layers=4, num_layers_per_virtual_pipeline_stage=1),
         "does not go with --num-layers-per-virtual-pipeline-stage"),
    ):  # fmt: skip
        with pytest.raises(WorkerError) as error:
            run(pool, processes, **teacher | changes)
        text = re.sub(r"\s+", " ", str(error.value) + capfd.readouterr().err)
        assert words in text, (words, text[-2000:])
        assert "--teacher-load" in text


def test_base_is_what_the_teacher_is_not():
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        assert TEACHER[name] != BASE[name]

"""--eval-tasks: the numbers of tools/evaluate.py while training, at any layout; the training is the same."""

import csv

import pytest

from megatron_ext.arguments.parser import CommandLineError, configured
from tests.functional.test_rounds import refusal
from tests.functional.test_run import BASE
from tests.helpers import benchmarks
from tests.helpers.training import flags, losses, pretrain
from tests.unit.tokenizer.sample_models import trained

TASKS = ["cmmlu", "c3", "piqa"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    """A run of four iterations on random ids of a real tokenizer, scored at 0, 2 and 4."""
    home = tmp_path_factory.mktemp("eval_tasks")
    (home / "small.model").write_bytes(trained())
    scored = dict(
        eval_tasks=TASKS,
        eval_tasks_interval=2,
        eval_tasks_limit=7,
        eval_tasks_data_dir=benchmarks.write(home / "data"),
    )
    tokenizer = dict(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=home / "small.model", vocab_size=None
    )
    return BASE | tokenizer | dict(train_iters=4) | scored


def scores(records: list[dict]) -> dict[int, dict[str, float]]:
    """Iteration -> name -> number."""
    return {
        record["iteration"]: {name: value for name, value in record.items() if "/" in name}
        for record in records
        if record.get("split") == "tasks"
    }


def test_equals_the_tool_to_the_last_bit_and_leaves_training_alone(pool, base, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval (extra eval)")
    from megatron_ext.harness.options import EvaluateOptions
    from megatron_ext.harness.run import evaluate

    save = tmp_path / "save"
    records = pretrain(pool, 1, flags(**base, save=save, save_interval=2, tensorboard_dir=tmp_path / "board"))
    found = scores(records)
    assert list(found) == [0, 2, 4]
    for iteration in (2, 4):
        options = EvaluateOptions(
            load=str(save), ckpt_step=iteration, limit=7, data_dir=str(base["eval_tasks_data_dir"]),
            tasks=[f"{name}_cloze" for name in TASKS],
        )  # fmt: skip
        tasks = pool.run(1, evaluate, options, True)[0]["tasks"]
        numbers = {
            f"{name}/{metric}{ending}": number[key]
            for name, task in tasks.items()
            for metric, number in task["metrics"].items()
            for key, ending in (("value", ""), ("error", "_error"))
        }
        assert found[iteration] == numbers
    assert scores(pretrain(pool, 1, flags(**base, load=save, skip_train=True))) == {4: found[4]}
    without = base | {name: None for name in base if name.startswith("eval_tasks")}
    assert losses(pretrain(pool, 1, flags(**without))) == losses(
        [record for record in records if "split" not in record]
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    events = board.Scalars("c3_cloze bits_per_byte")
    assert [event.step for event in events] == [0, 2, 4]
    assert events[-1].value == pytest.approx(found[4]["c3_cloze/bits_per_byte"])


LAYOUTS = {
    "tensor and sequence": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "interleaved pipeline": (
        2, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
    ),
    "data, with parameters gathered late": (
        2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
}  # fmt: skip


def test_equal_at_every_layout(pool, base):
    base = base | dict(num_layers=4, micro_batch_size=1)
    alone = scores(pretrain(pool, 1, flags(**base)))
    for name, (processes, layout) in LAYOUTS.items():
        found = scores(pretrain(pool, processes, flags(**base | layout)))
        assert list(found) == list(alone)
        for iteration, numbers in alone.items():
            assert found[iteration] == pytest.approx(numbers, abs=1e-3), name


def test_bad_input_is_refused(pool, base, tmp_path):
    changes = dict(eval_tasks=["piqa", "squad"], eval_tasks_data_dir=None, context_parallel_size=2)
    changes |= dict(tokenizer_type="NullTokenizer", tokenizer_model=None, vocab_size=200)
    changes |= dict(add_bias_linear=False)
    named = {name: value for name, value in base.items() if name != "disable_bias_linear"}
    with pytest.raises(CommandLineError) as refused:
        configured(named | changes)
    wrong = str(refused.value)
    assert "--eval-tasks squad: unknown; there are cmmlu mmlu" in wrong
    assert "--eval-tasks needs --eval-tasks-data-dir" in wrong
    assert "NullTokenizer's ids are numbers" in wrong and "--context-parallel-size 1" in wrong
    missing = refusal(pool, flags(**base | dict(eval_tasks_data_dir=tmp_path)))
    assert f"{tmp_path}/cmmlu/test/*.csv: there is no such file" in missing
    damaged = benchmarks.write(tmp_path / "damaged", 3)
    path = damaged / "cmmlu/test/anatomy.csv"
    rows = list(csv.reader(path.open()))
    rows[2][-1] = "Q"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    said = refusal(pool, flags(**base | dict(eval_tasks_data_dir=damaged)))
    assert f"{path}: record 2: not a question of this benchmark" in said


def test_the_watchdog_hears_of_every_pass(pool, base):
    run = flags(**base | dict(eval_tasks=["cmmlu"], eval_tasks_limit=None, train_iters=1))
    phases = pool.run(1, phases_of, run)[0]
    assert phases.count(("scoring cmmlu_cloze", 0)) > 2 and ("scoring cmmlu_cloze", 1) in phases


def phases_of(argv: list[str]) -> list[tuple]:
    """What a run tells its watchdog."""
    import pretrain_pangu_pro
    from megatron_ext.training.watchdog import Watchdog

    heard, note = [], Watchdog.note

    def listening(self: Watchdog, *phase: object) -> None:
        heard.append(phase)
        note(self, *phase)

    Watchdog.note = listening
    pretrain_pangu_pro.main(argv)
    return heard

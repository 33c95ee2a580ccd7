"""A student with a teacher: losses and every gradient, at each layout, are those of one process."""

from pathlib import Path

import pytest

from megatron_ext.training import distributed, layout_check
from tests.distributed.test_layout_check import BASE
from tests.helpers.teachers import TEACHER, of_two_vocabularies
from tests.helpers.training import flags, pretrain

STUDENT = BASE | dict(tensorboard_dir=None, save=None, lr=1e-3)
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": TP,
    "tp2-sp": TP | {"sequence_parallel": True},
    "pp2": PP,
    "dp2-sharded": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "tp2-pp2": TP | PP | {"micro_batch_size": 1},
}
#: The teacher's share is large, so that an error of it is not hidden; with 200 of 256 rows it has padding.
LOSSES = {
    "same-whole": dict(vocab_size=199, distillation_alpha=0.9, distillation_temperature=2.0),
    "folded-top": dict(distillation_alpha=0.7, distillation_top_k=8, distillation_temperature=0.8),
    "folded-whole": dict(distillation_alpha=1.0, distillation_temperature=1.5),
}


def recorded(folder: str, values: dict) -> None:
    """Record two steps on the processes that are there."""
    run = layout_check.settings(flags(**values), None, one_process=False)
    Path(folder).mkdir(exist_ok=True)
    layout_check.record(run, Path(folder), 2)
    distributed.finalize()


@pytest.fixture(scope="module")
def teachers(pool, tmp_path_factory) -> dict[str, dict]:
    """Kind of loss -> the flags of the student and its teacher."""
    folder = tmp_path_factory.mktemp("teachers")
    theirs, mine = of_two_vocabularies(folder)
    same = {"vocab_size": LOSSES["same-whole"]["vocab_size"]}
    for name, data in (("same", same), ("folded", theirs)):
        values = STUDENT | TEACHER | data | dict(save=folder / name, save_interval=1, train_iters=1, lr=1e-4)
        pretrain(pool, 1, flags(**values))
    return {
        name: STUDENT
        | (mine if "folded" in name else same)
        | {"teacher_load": folder / name.split("-")[0]}
        | loss
        for name, loss in LOSSES.items()
    }


@pytest.fixture(scope="module")
def references(pool, teachers, tmp_path_factory) -> dict[str, layout_check.Record]:
    folder = tmp_path_factory.mktemp("one")
    for name, values in teachers.items():
        pool.run(1, recorded, str(folder / name), values, timeout=120)
    return {name: layout_check.Record(folder / name) for name in teachers}


@pytest.mark.parametrize(
    ("loss", "layout"),
    [("folded-top", layout) for layout in LAYOUTS]
    + [(loss, layout) for loss in ("same-whole", "folded-whole") for layout in ("tp2-sp", "pp2")],
)
def test_every_layout_is_one_process(pool, tmp_path, monkeypatch, teachers, references, layout, loss):
    processes = 4 if layout == "tp2-pp2" else 2
    pool.run(processes, recorded, str(tmp_path / "many"), teachers[loss] | LAYOUTS[layout], timeout=120)
    monkeypatch.setitem(layout_check.TOLERANCES, "float32", 1e-5)
    record = layout_check.Record(tmp_path / "many")
    assert layout_check.compare(references[loss], record) == []
    assert record.losses() == pytest.approx(references[loss].losses(), rel=1e-6)

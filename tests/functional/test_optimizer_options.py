"""z-loss, embeddings without weight decay, updates skipped by gradient norm: alike at every layout."""

import numpy as np
import pytest

from tests.functional.test_run import run
from tests.helpers.training import validation

TIED = {"untie_embeddings_and_output_weights": False}
ALL = dict(z_loss_coeff=1e-2, no_embedding_weight_decay=True, grad_norm_skip_threshold=1.7, weight_decay=2.0)
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = [(2, TP | {"sequence_parallel": True}), (2, PP), (2, {"use_distributed_optimizer": True})]


def trace(pool, processes: int = 1, **changes) -> list[tuple[float, float, bool]]:
    """Loss, norm and whether the update was skipped, of every iteration."""
    records = [r for r in run(pool, processes, eval_iters=0, **changes) if "split" not in r]
    return [(r["lm_loss"], r["grad_norm"], r["skipped"]) for r in records]


@pytest.fixture(scope="module")
def whole(pool):
    return trace(pool, **ALL | TIED)


def test_some_updates_are_skipped(whole):
    skipped = [norm > ALL["grad_norm_skip_threshold"] for _, norm, _ in whole]
    assert [s for _, _, s in whole] == skipped and any(skipped) and not all(skipped)


@pytest.mark.parametrize(("processes", "layout"), LAYOUTS, ids=["tp2-sp", "pp2", "dp2-distributed"])
def test_every_layout_is_one_process(pool, whole, processes, layout):
    """Tied, so that a stage's copy of the embedding must be left undecayed as well."""
    found = trace(pool, processes, **ALL | TIED | layout)
    assert np.array(found) == pytest.approx(np.array(whole), rel=1e-5)


def test_each_changes_the_run(pool, whole):
    """Each option by itself makes another run; without all three it is the plain one."""
    ends = [trace(pool, **TIED | {"weight_decay": 2.0} | changes)[-1][0] for changes in (
        {}, {"z_loss_coeff": 1e-2}, {"no_embedding_weight_decay": True}, {"grad_norm_skip_threshold": 1.7}
    )]  # fmt: skip
    assert len({*ends, whole[-1][0]}) == 5


def test_nothing_changes_where_every_update_is_skipped(pool, tmp_path):
    """After one skipped update and after four the held-out loss is the same, to the last bit."""
    run(pool, save=tmp_path, save_interval=3, train_iters=3)
    still = dict(load=tmp_path, finetune=True, grad_norm_skip_threshold=1e-6)
    assert (
        validation(run(pool, **still, train_iters=1))["lm_loss"]
        == (validation(run(pool, **still, train_iters=4))["lm_loss"])
    )


def test_resume_is_exact_with_all_of_them(pool, tmp_path):
    whole = trace(pool, save=tmp_path, save_interval=3, **ALL)
    assert {skipped for *_, skipped in whole} == {True, False}
    assert trace(pool, load=tmp_path, ckpt_step=3, **ALL) == whole[3:]


def test_a_resumed_run_may_spare_the_embeddings(pool, tmp_path):
    """They move to another parameter group with their moments: without any decay the run is the same."""
    words = {"weight_decay": 0.0}
    whole = trace(pool, save=tmp_path, save_interval=3, **words)
    assert trace(pool, load=tmp_path, ckpt_step=3, no_embedding_weight_decay=True, **words) == whole[3:]

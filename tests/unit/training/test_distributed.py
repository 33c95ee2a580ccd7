"""What Megatron-Core is told of a run."""

import pytest
from megatron.core import num_microbatches_calculator as calculator

from megatron_ext.config import RunConfig
from megatron_ext.platform import PlatformError
from megatron_ext.training.distributed import count_microbatches


@pytest.fixture
def uncounted(monkeypatch):
    """The calculator is not set, and is afterwards what it was before."""
    monkeypatch.setattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)


def test_a_ramp_that_megatron_core_leaves_out_is_refused(uncounted, monkeypatch):
    """Versions from 0.18 on take the argument and do nothing with it."""
    init = calculator.init_num_microbatches_calculator
    monkeypatch.setattr(
        calculator, "init_num_microbatches_calculator", lambda rank, ramp, *rest: init(rank, None, *rest)
    )
    run = RunConfig.of(
        dict(
            rampup_batch_size=[2, 2, 20],
            global_batch_size=8,
            micro_batch_size=2,
            data_parallel_size=1,
            rank=0,
        )
    )
    with pytest.raises(PlatformError, match="--rampup-batch-size"):
        count_microbatches(run)


def test_a_batch_that_stays_is_counted(uncounted):
    run = RunConfig.of(dict(global_batch_size=8, micro_batch_size=2, data_parallel_size=2, rank=0))
    count_microbatches(run)
    assert calculator.get_num_microbatches() == 2

"""Values derived from other flags, as in Megatron-LM."""

import inspect

import pytest
import torch

from megatron_ext.arguments.defaults import iterations_left, running_batch
from megatron_ext.arguments.parser import read_args
from megatron_ext.config import RunConfig

BASE = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--tokenizer-type NullTokenizer --vocab-size 99 --lr 1e-3 --micro-batch-size 2 --mock-data"
)


def read(flags: str, world_size: int = 1):
    return read_args(f"{BASE} {flags}".split(), world_size=world_size, device="cpu")


def test_feed_forward_width():
    assert read("--train-iters 5").model.ffn_hidden_size == 256
    assert read("--train-iters 5 --swiglu").model.ffn_hidden_size == 128  # 8/3 * 64 = 170.7, in 64s
    assert read("--train-iters 5 --swiglu --ffn-hidden-size 170").model.ffn_hidden_size == 170


def test_data_parallel_size_and_batch():
    run = read("--train-iters 5 --tensor-model-parallel-size 2", world_size=6)
    assert (run.parallel.data_parallel_size, run.training.global_batch_size) == (3, 6)


def test_virtual_stages():
    flags = "--train-iters 5 --pipeline-model-parallel-size 2 --global-batch-size 8"
    assert read(flags, 2).parallel.virtual_pipeline_model_parallel_size is None
    run = read(f"{flags} --num-layers-per-virtual-pipeline-stage 2", 2)
    assert run.parallel.virtual_pipeline_model_parallel_size == 2
    assert run.parallel.overlap_p2p_comm
    assert read(f"{flags} --num-layers-per-virtual-pipeline-stage 4", 2).parallel.overlap_p2p_comm is False


def test_schedule_in_iterations_is_counted_in_samples():
    run = read("--train-iters 50 --global-batch-size 4 --lr-warmup-fraction 0.1 --lr-decay-iters 40")
    assert (run.schedule.lr_decay_steps, run.schedule.wd_incr_steps, run.schedule.wsd_decay_steps) == (
        160,
        200,
        None,
    )
    assert run.schedule.lr_warmup_steps == pytest.approx(16)
    run = read("--train-iters 50 --lr-decay-style WSD --lr-wsd-decay-iters 10 --lr-warmup-iters 3")
    assert (run.schedule.lr_decay_steps, run.schedule.wsd_decay_steps, run.schedule.lr_warmup_steps) == (
        100,
        20,
        6,
    )


def test_schedule_in_samples():
    run = read("--train-samples 100 --global-batch-size 4 --lr-warmup-samples 8")
    assert (run.training.train_iters, run.schedule.lr_decay_steps, run.schedule.lr_warmup_steps) == (
        25,
        100,
        8,
    )


RAMPS = [(None, 8, 1), ([2, 2, 20], 8, 1), ([4, 4, 37], 8, 1), ([2, 6, 1], 8, 1)]
#: Rounded down to whole micro batches of three ranks.
ROUNDED = [(None, 26, 3), ([6, 2, 20], 26, 3), ([8, 9, 37], 26, 3)]


@pytest.mark.parametrize(("rampup", "batch", "ranks"), [*RAMPS, *ROUNDED])
@pytest.mark.parametrize("samples", [7, 40, 100])
def test_ramp_up_equals_megatron_cores_calculator(rampup, batch, ranks, samples):
    from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator

    if "rampup_batch_size" not in inspect.signature(_build_num_microbatches_calculator).parameters:
        pytest.skip("this Megatron-Core knows no ramp-up (docs/engine.md)")
    run = RunConfig.of(dict(
        rampup_batch_size=rampup, global_batch_size=batch, micro_batch_size=2, data_parallel_size=ranks,
        decrease_batch_size_if_needed=ranks > 1, train_samples=samples,
    ))  # fmt: skip
    calculator = _build_num_microbatches_calculator(
        0, rampup, batch, 2, ranks, run.training.decrease_batch_size_if_needed
    )
    consumed = iterations = 0
    left = {}
    while consumed < samples:
        left[consumed] = iterations
        calculator.update(consumed, False)
        batch = calculator.get_current_running_global_batch_size()
        assert batch == running_batch(run, consumed)
        if consumed + batch > samples and (not rampup or consumed > rampup[2]):
            break  # a last batch that the samples do not fill is not run
        consumed, iterations = consumed + batch, iterations + 1
    assert iterations_left(run) == iterations
    for consumed, done in left.items():  # a run that is resumed there ends at the same iteration
        assert done + iterations_left(run, consumed) == iterations


def test_precision():
    assert read("--train-iters 5").precision.params_dtype is torch.float32
    run = read("--train-iters 5 --bf16")
    assert run.precision.params_dtype is torch.bfloat16
    assert run.parallel.accumulate_allreduce_grads_in_fp32
    assert not read(
        "--train-iters 5 --bf16 --grad-reduce-in-bf16"
    ).parallel.accumulate_allreduce_grads_in_fp32


def test_launcher_environment(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    run = read_args(f"{BASE} --train-iters 5".split(), device="cpu")
    assert (
        run.process.world_size,
        run.process.rank,
        run.process.local_rank,
        run.parallel.data_parallel_size,
    ) == (4, 3, 1, 4)

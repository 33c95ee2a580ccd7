"""Runs as a user starts them: resumed, stopped, ramped up, in bf16, with errors, and text generation."""

import os
import signal
import threading

import pytest
import torch

from tests.helpers.pool import WorkerError
from tests.helpers.training import _pretrain, flags, losses, pretrain, validation

BASE = dict(
    mock_data=True, tokenizer_type="NullTokenizer", vocab_size=255, num_layers=2, hidden_size=64,
    ffn_hidden_size=128, num_attention_heads=4, seq_length=32, max_position_embeddings=64,
    position_embedding_type="rope", normalization="RMSNorm", swiglu=True, disable_bias_linear=True,
    untie_embeddings_and_output_weights=True, attention_dropout=0.0, hidden_dropout=0.0,
    series_activation_order=2, augmented_shortcuts=1, augmented_shortcut_reduction=8, micro_batch_size=2,
    global_batch_size=8, train_iters=6, lr=1e-2, min_lr=1e-3, lr_decay_style="cosine", eval_iters=1,
    log_interval=100, num_workers=0,
)  # fmt: skip


def run(pool, processes: int = 1, **changes) -> list[dict]:
    return pretrain(pool, processes, flags(**BASE | changes))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, {}), (2, {"use_distributed_optimizer": True}), (2, {"tensor_model_parallel_size": 2})],
    ids=["1p", "dp2-distributed-optimizer", "tp2"],
)
def test_resumed_is_uninterrupted(pool, tmp_path, processes, layout):
    """Bit for bit on the same layout, dropout included; to rounding on one process."""
    dropout = dict(attention_dropout=0.1, hidden_dropout=0.1)
    saves = dict(save=tmp_path, save_interval=3)
    whole = run(pool, processes, **layout, **dropout, **saves)
    resumed = run(pool, processes, **layout, **dropout, load=tmp_path, ckpt_step=3)
    assert [record["iteration"] for record in resumed[:3]] == [4, 5, 6]
    assert losses(resumed) == losses(whole)[3:]
    assert [r["grad_norm"] for r in resumed[:3]] == [r["grad_norm"] for r in whole[3:6]]
    assert validation(resumed) == validation(whole)


def test_resumed_on_another_layout(pool, tmp_path):
    whole = run(pool, 2, tensor_model_parallel_size=2, save=tmp_path, save_interval=3)
    for processes, layout in ((1, {}), (2, {"pipeline_model_parallel_size": 2})):
        resumed = run(pool, processes, **layout, load=tmp_path, ckpt_step=3)
        assert losses(resumed) == pytest.approx(losses(whole)[3:], rel=2e-5)


def _pretrain_and_signal(argv: list[str], after: float) -> None:
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM))
    if torch.distributed.get_rank() == 0:
        timer.start()
    _pretrain(argv)
    assert timer.finished.is_set() or torch.distributed.is_initialized() is False


def test_sigterm_on_one_rank_saves_on_all(pool, tmp_path):
    argv = flags(**BASE | dict(train_iters=100_000, lr_decay_iters=100, save=tmp_path, save_interval=100_000))
    pool.run(2, _pretrain_and_signal, argv, 8.0, timeout=120)
    saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < 100_000
    assert (tmp_path / f"iter_{saved:07d}").is_dir()


def _memory_given_back(argv: list[str], level: int) -> int:
    """How often a run releases cached GPU memory; on a CPU, how often it would."""
    from megatron_ext import arguments, platform

    calls, parse = [], arguments.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "empty_cache", lambda: calls.append(1))

        def with_level(argv):  # which the command line has for GPUs only
            return parse(argv).but(empty_unused_memory_level=level)

        patch.setattr(arguments, "parse_args", with_level)
        _pretrain(argv)
    return len(calls)


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (1, 6 + 3), (2, 2 * 6 + 3)])
def test_unused_memory_is_given_back_when_asked(pool, level, expected):
    """Before each of six updates, after each at level 2, after two validations and the test."""
    assert pool.run(1, _memory_given_back, flags(**BASE | dict(eval_interval=3)), level) == [expected]


def test_exit_interval_saves(pool, tmp_path):
    records = run(pool, exit_interval=4, save=tmp_path, save_interval=100)
    assert records[-1]["iteration"] == 4
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "4"


def _processes_left(argv: list[str]) -> list[str]:
    import gc
    import multiprocessing

    gc.disable()  # what only a collection of cycles would end is still there when Python exits
    try:
        _pretrain(argv)
        return [process.name for process in multiprocessing.active_children()]
    finally:
        gc.enable()


def test_processes_that_read_data_end_with_the_run(pool):
    """Python joins worker processes at exit: a remaining one hangs the job after its last line."""
    assert pool.run(1, _processes_left, flags(**BASE | dict(num_workers=1))) == [[]]


def test_batch_grows(pool):
    records = run(
        pool, train_iters=None, train_samples=40, rampup_batch_size=[4, 4, 16], global_batch_size=12,
        micro_batch_size=4,
    )  # fmt: skip
    batches = [record["global_batch_size"] for record in records if "split" not in record]
    assert batches[0] == 4 and batches[-1] == 12 and batches == sorted(batches)
    steps = [record["consumed_samples"] for record in records if "split" not in record]
    assert steps == [sum(batches[: i + 1]) for i in range(len(batches))]


def test_bad_numbers_are_named_on_every_rank(pool):
    with pytest.raises(WorkerError) as failed:
        run(pool, 2, lr=1e38, min_lr=0.0, clip_grad=0.0, weight_decay=0.0)
    text = str(failed.value)
    assert "BadNumbers" in text and "rank 0" in text and "rank 1" in text
    assert "loss of microbatch" in text or "in the gradient of" in text


def test_bf16_is_near_fp32(pool):
    exact, rough = (losses(run(pool, bf16=bf16)) for bf16 in (False, True))
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-2)
    assert rough[-1] < rough[0] - 0.5


def test_recompute_and_overlap_change_nothing(pool):
    plain = losses(run(pool, 2))
    other = run(
        pool, 2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True,
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
    )  # fmt: skip
    assert losses(other) == pytest.approx(plain, rel=2e-5)


def _generate(folder: str) -> tuple[list[int], list[int]]:
    from megatron_ext.inference import Sampling, generate, load_for_inference

    model, tokenizer, _ = load_for_inference(folder)
    prompt = list(range(5, 15))
    cached = list(generate(model, prompt, 12, Sampling(temperature=0), tokenizer.vocab_size))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.tensor([ids])
            logits = model(tokens, torch.arange(len(ids))[None], None, runtime_gather_output=True)
            ids.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
    return cached, ids[len(prompt) :]


def test_generation_with_a_cache_is_generation_without(pool, tmp_path):
    run(pool, train_iters=30, save=tmp_path, save_interval=30)
    [(cached, recomputed)] = pool.run(1, _generate, str(tmp_path))
    assert cached == recomputed
    for ranks in pool.run(2, _generate, str(tmp_path)):  # tensor parallel, from the same checkpoint
        assert ranks[0] == cached


def _memory_warning(argv: list[str]) -> str:
    import contextlib
    import io

    from megatron_ext import platform

    said, platform.device_memory_bytes = io.StringIO(), lambda: 1 << 20
    with contextlib.redirect_stdout(said):
        _pretrain(argv)
    return said.getvalue()


def test_a_layout_that_cannot_fit_is_warned_of(pool):
    [said] = pool.run(1, _memory_warning, flags(**BASE | dict(train_iters=1)))
    assert "WARNING: this layout needs about" in said and "0.0 GiB are there" in said

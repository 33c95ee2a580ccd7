"""Rounds as users run them: recorded at every layout, killed and resumed, trained on, resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_ext.data.rounds.build_round import RoundOptions, build_round
from megatron_ext.data.rounds.loss_record import read_losses, record_paths
from tests.conftest import REPOSITORY
from tests.helpers.pool import WorkerError
from tests.helpers.training import _pretrain, flags, losses, pretrain
from tests.unit.data import corpora

SAMPLES = 44  # no multiple of any layout's microbatches
MODEL = dict(
    tokenizer_type="NullTokenizer", vocab_size=255, num_layers=2, hidden_size=64, ffn_hidden_size=128,
    num_attention_heads=4, seq_length=32, max_position_embeddings=64, position_embedding_type="rope",
    normalization="RMSNorm", swiglu=True, disable_bias_linear=True, attention_dropout=0.0,
    untie_embeddings_and_output_weights=True, hidden_dropout=0.0, series_activation_order=2,
    augmented_shortcuts=1, augmented_shortcut_reduction=8, micro_batch_size=2, eval_iters=0, num_workers=0,
    split="90,10,0",
)  # fmt: skip
TRAINING = dict(
    global_batch_size=4, train_iters=11, lr=1e-2, min_lr=1e-3, lr_decay_style="cosine", log_interval=100
)
LAYOUTS = {
    "1": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "pp2-interleaved": (2, dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)),
}


@pytest.fixture(scope="module")
def home(pool, tmp_path_factory):
    """A folder with a blend of two datasets and round 1 trained on it, its losses recorded online."""
    home = tmp_path_factory.mktemp("rounds")
    data = MODEL | TRAINING | dict(data_path=corpora.make_blend(home), data_cache_path=home / "cache")
    records = pretrain(
        pool, 1,
        flags(**data, save=home / "round1", save_interval=5, record_sample_loss=home / "online.npy",
              record_mode="online"),
    )  # fmt: skip
    return Namespace(path=home, data=data, losses=losses(records))


def record(pool, home, output, processes=1, **changes):
    argv = flags(**home.data | dict(load=home.path / "round1", record_sample_loss=output) | changes)
    pool.run(processes, _pretrain, argv, timeout=240)
    return read_losses(output)


@pytest.fixture(scope="module")
def frozen(pool, home):
    return record(pool, home, home.path / "frozen.npy")


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_losses_do_not_depend_on_the_layout(pool, home, frozen, tmp_path, layout):
    processes, changes = LAYOUTS[layout]
    found = record(pool, home, tmp_path / "losses", processes, **changes)
    np.testing.assert_allclose(found.losses, frozen.losses, rtol=0, atol=1e-6)
    assert found.tokens.tolist() == frozen.tokens.tolist() == [32] * SAMPLES
    assert found.sources.tolist() == frozen.sources.tolist()
    assert found.manifest["dataset"] == frozen.manifest["dataset"]


def _plain_losses(argv) -> list[float]:
    """Each sample of the training set by itself through the model of the checkpoint."""
    from megatron_ext.arguments.parser import read_args
    from megatron_ext.data import build_datasets
    from megatron_ext.inference import load_for_inference
    from megatron_ext.training.data import dataset_sizes

    run = read_args(argv)
    model, tokenizer, _ = load_for_inference(run.checkpoint.load)
    dataset = build_datasets(run, tokenizer, dataset_sizes(run.training, run.validation))[0]
    found = []
    with torch.no_grad():
        for number in range(SAMPLES):
            sample = {name: value[None] for name, value in dataset[number].items() if name != "dataset_id"}
            loss = model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
            found.append(loss.double().mean().item())
    return found


def test_losses_are_those_of_a_plain_evaluation(pool, home, frozen):
    argv = flags(**home.data, load=home.path / "round1")
    [plain] = pool.run(1, _plain_losses, argv)
    np.testing.assert_allclose(frozen.losses, plain, rtol=0, atol=1e-6)
    assert frozen.manifest["mean_loss"] == pytest.approx(np.mean(plain), abs=1e-6)
    assert set(np.bincount(frozen.sources).tolist()) == {31, 13}  # 0.7 and 0.3 of 44


def test_online_losses_are_those_trained_on(pool, home, frozen):
    online = read_losses(home.path / "online.npy")
    assert online.manifest["kind"] == "online" and online.manifest["complete"]
    batches = online.losses.reshape(11, 4).mean(1)
    assert batches == pytest.approx(home.losses, rel=1e-6)
    assert online.sources.tolist() == frozen.sources.tolist()
    assert np.abs(online.losses - frozen.losses).max() > 0.1  # the model moved on


def test_online_recording_resumes(pool, home, tmp_path):
    """From the checkpoint of iteration 5: nothing is missing, nothing differs."""
    values = home.data | dict(
        save=tmp_path / "save", save_interval=5, record_mode="online", record_sample_loss=tmp_path / "online"
    )
    pretrain(pool, 2, flags(**values, exit_interval=5))
    assert read_losses(tmp_path / "online", allow_incomplete=True).manifest["recorded"] == 20
    pretrain(pool, 2, flags(**values, load=tmp_path / "save"))
    resumed, whole = read_losses(tmp_path / "online"), read_losses(home.path / "online.npy")
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-5)


def test_killed_recording_goes_on(home, frozen, tmp_path):
    """SIGKILL at RECORDING_KILLS random moments, restarted each time: the same bytes as without."""
    path = tmp_path / "losses.npy"
    command = [sys.executable, "-c", _SLOW_RECORDING, *flags(**home.data, load=home.path / "round1")]
    command += ["--record-sample-loss", str(path)]
    kills, seen, rest = int(os.environ.get("RECORDING_KILLS", 2)), [], random.Random()
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        before, deadline = recorded(path), time.monotonic() + 180
        while recorded(path) < before + 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rest.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.append(recorded(path))
        if seen[-1] == SAMPLES:
            break
    assert 0 < seen[0] < SAMPLES
    output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert f"{seen[-1]:,} are there" in output
    found = read_losses(path)
    assert record_paths(path).losses.read_bytes() == frozen.path.read_bytes()
    assert found.manifest == frozen.manifest


def recorded(path) -> int:
    try:
        return json.loads(record_paths(path).manifest.read_text())["recorded"]
    except FileNotFoundError:
        return 0


#: Small passes, each marked and followed by a rest, so that a kill falls between them or into one.
_SLOW_RECORDING = """
import sys, time
import pretrain_pangu_pro
from megatron_ext.data.rounds import loss_record
from megatron_ext.training import recording
recording.MICROBATCHES_PER_STAGE, loss_record.MARK_EVERY_S = 2, 0.0
write = loss_record.LossRecord.write
loss_record.LossRecord.write = lambda *args: (write(*args), time.sleep(0.3))
pretrain_pangu_pro.main(sys.argv[1:])
"""


def build(losses_path, folder, **options) -> str:
    build_round(
        losses_path, RoundOptions(**{"rate": 0.5, "group_size": 4, "seed": 1} | options), folder / "round"
    )
    return str(folder / "round.npy")


def test_all_samples_in_order_are_the_run_without(pool, home, frozen, tmp_path):
    index = build(frozen.path, tmp_path, rate=1.0, order="training")
    found = losses(pretrain(pool, 1, flags(**home.data, round_index=index)))
    assert found == home.losses


@pytest.mark.parametrize("processes", [1, 2])
def test_round_resumes_bit_for_bit(pool, home, frozen, tmp_path, processes):
    """Two epochs and a bit over half of the samples, from the weights of round 1, stopped in the second."""
    index = build(frozen.path, tmp_path)
    values = home.data | dict(
        round_index=index, pretrained_checkpoint=home.path / "round1", train_iters=14,
        record_sample_loss=tmp_path / "online", record_mode="online",
    )  # fmt: skip
    whole = pretrain(pool, processes, flags(**values, load=tmp_path / "none"))
    seen = read_losses(tmp_path / "online", allow_incomplete=True)
    assert np.flatnonzero(seen.tokens >= 0).tolist() == np.load(index).tolist()
    saves = dict(save=tmp_path / "save", load=tmp_path / "save", save_interval=9)
    values["record_sample_loss"] = values["record_mode"] = None
    first = pretrain(pool, processes, flags(**values, **saves, exit_interval=9))
    second = pretrain(pool, processes, flags(**values, **saves))
    assert [record["iteration"] for record in second] == list(range(10, 15))
    assert losses(first) + losses(second) == losses(whole)
    assert losses(whole)[0] < home.losses[0] - 0.1  # the weights are those of round 1


def test_schedule_restarts_or_continues(pool, home, frozen, tmp_path):
    index = build(frozen.path, tmp_path)
    values = home.data | dict(round_index=index, pretrained_checkpoint=home.path / "round1")
    restarted = pretrain(pool, 1, flags(**values, load=tmp_path / "none"))
    values |= dict(round_schedule="continue", train_iters=22, lr_decay_iters=22)
    saves = dict(save=tmp_path / "save", load=tmp_path / "save", save_interval=5, exit_interval=15)
    continued = pretrain(pool, 1, flags(**values, **saves))
    continued += pretrain(pool, 1, flags(**values, **saves | dict(exit_interval=None)))
    assert [r["iteration"] for r in restarted] == list(range(1, 12))
    assert [r["iteration"] for r in continued] == list(range(12, 23))
    assert [r["consumed_samples"] for r in continued] == list(range(48, 92, 4))

    def rate(iteration, length):
        return 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + np.cos(np.pi * iteration / length))

    assert [r["learning_rate"] for r in restarted] == pytest.approx([rate(i, 11) for i in range(1, 12)])
    assert [r["learning_rate"] for r in continued] == pytest.approx([rate(i, 22) for i in range(12, 23)])
    whole = pretrain(pool, 1, flags(**values, load=tmp_path / "none"))
    assert losses(whole) == losses(continued)


def refusal(pool, argv) -> str:
    with pytest.raises(WorkerError) as failed:
        pool.run(1, _pretrain, argv, timeout=120)
    return str(failed.value)


def test_an_index_of_another_training_set_is_refused(pool, home, frozen, tmp_path):
    values = home.data | dict(round_index=build(frozen.path, tmp_path))
    other = corpora.make_dataset(tmp_path / "other", [50] * 40)
    weight, first, _, second = home.data["data_path"]
    changes = {
        r"--data-path: \w+ \w+ there, \w+ \w+ here": dict(data_path=[weight, first, 0.3, other]),
        "the weights of the blend": dict(data_path=[0.6, first, 0.4, second]),
        "--seq-length: 32 there, 16 here": dict(seq_length=16),
        "--split: 0.0000% to 90.0000% there, 0.0000% to 80.0000% here": dict(split="80,20,0"),
        "--tokenizer-model": dict(vocab_size=254),
        "--seed: 1234 there, 5 here": dict(seed=5),
    }
    for message, change in changes.items():
        found = refusal(pool, flags(**values | change))
        assert re.search(message, found), found
    everything = refusal(pool, flags(**values | dict(seq_length=16, seed=5, split="80,20,0")))
    assert all(flag in everything for flag in ("--seq-length", "--seed", "--split"))


def test_other_refusals(pool, home, frozen, tmp_path):
    index = build(frozen.path, tmp_path)
    mixed = refusal(pool, flags(**home.data, round_index=index, load=home.path / "round1"))
    assert "is not of the round" in mixed and "--pretrained-checkpoint" in mixed
    pretrain(pool, 1, flags(**home.data, round_index=index, save=tmp_path / "save", save_interval=100))
    forgotten = refusal(pool, flags(**home.data, load=tmp_path / "save"))
    assert "was made in a round: give its --round-index" in forgotten
    elsewhere = refusal(
        pool,
        flags(**home.data | dict(seed=5), load=home.path / "round1", record_sample_loss=frozen.path),
    )
    assert "--seed: 1234 there, 5 here" in elsewhere
    absent = refusal(pool, flags(**home.data, load=tmp_path / "none", record_sample_loss=tmp_path / "x"))
    assert "no checkpoint found" in absent

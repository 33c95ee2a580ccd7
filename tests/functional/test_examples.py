"""The shipped run scripts: every flag read by the real parser, and one of them run, narrowed."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

RUNS = ("run_1b.sh", "run_1.5b.sh")


def bash(script: str, *words: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of examples/ as a user does, from another folder."""
    return subprocess.run(
        ["bash", str(REPOSITORY / "examples" / script), *words],
        env=os.environ | {"GPUS_PER_NODE": "", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("script", "settings", "shown"),
    [
        ("run_1b.sh", {}, "995,604,736 parameters on 8 devices"),
        ("run_1.5b.sh", {"FP8": "1", "NUM_NODES": "4", "NODE_RANK": "3"}, "tensor 1 x pipeline 1 x data 32"),
        ("run_1b.sh", {"SMOKE": "1"}, "10 iterations, 5,120 tokens"),
    ],
)
def test_dry_run_reads_every_flag(script, settings, shown, tmp_path):
    done = bash(script, f"{tmp_path}/a b", str(tmp_path), "MOCK", "MOCK", DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torchrun ") and "every flag is understood" in done.stdout
    assert shown in done.stdout
    assert not (tmp_path / "a b").exists()


def test_dry_run_names_what_is_wrong(tmp_path):
    words = [str(tmp_path), str(tmp_path), f"{tmp_path}/no.model", "0.3", f"{tmp_path}/no_text_document"]
    done = bash("run_1.5b.sh", *words, DRY_RUN="1", TRAIN_ITERS="0")
    assert done.returncode == 2
    for problem in ("--train-iters 0", "no.model: there is no such file", "no_text_document.bin"):
        assert problem in done.stderr


@pytest.mark.parametrize("script", RUNS)
def test_usage(script):
    done = bash(script, "checkpoints")
    assert done.returncode == 2
    assert f"usage: bash examples/{script}" in done.stderr


@pytest.mark.slow
def test_smoke_trains_a_narrowed_model(tmp_path):
    """The flags of the 1.5B model, except those of SMOKE_ARGS, on two processes; in a path with a blank."""
    checkpoints = tmp_path / "check points"
    words = [str(checkpoints), str(tmp_path / "logs"), "MOCK", "MOCK"]
    port = free_port()
    done = bash("run_1.5b.sh", *words, SMOKE="1", MASTER_PORT=port, GPUS_PER_NODE="2", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if "split" not in r] == list(range(1, 11))
    assert records[-1]["split"] == "test"
    assert Path(checkpoints, "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


@pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="minutes of work: LONG_TESTS=1")
def test_inheritance_from_end_to_end(tmp_path):
    """Too short to learn: every step of the example, its table and its plot."""
    lengths = {"SOURCE_ITERS": "10", "TARGET_ITERS": "3", "MASK_STEPS": "2"}
    done = bash("inherit_then_train.sh", timeout=1800, INHERIT_DIR=str(tmp_path / "run"), **lengths)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("bits per byte\n") :].splitlines()[2:8]
    rows = {row.split()[0]: [float(word) for word in row.split()[1:] if word != "-"] for row in table}
    assert list(rows) == ["random_weights", "random", "l1", "l2", "taylor", "learned"]
    assert all(0 < value < 10 for row in rows.values() for value in row)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("done", ["true", "false"])
def test_a_picture_that_cannot_be_drawn_ends_no_example(tmp_path, done):
    examples = REPOSITORY / "examples"
    drawn = [
        line for path in examples.glob("*.sh") for line in path.read_text().splitlines() if "plot_" in line
    ]
    assert len(drawn) == 4 and all(line.startswith("picture tools/plot_") for line in drawn)
    function = next(line for line in (examples / "laptop.sh").read_text().splitlines() if "picture()" in line)
    (tmp_path / "python").write_text(f"#!/bin/sh\n{done}\n")
    (tmp_path / "python").chmod(0o755)
    script = f"set -euo pipefail; PATH={tmp_path}:$PATH; {function}\npicture tools/plot_metrics.py; echo end"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
    assert (run.returncode, run.stdout) == (0, "end\n")
    assert run.stderr == ("" if done == "true" else "going on without the picture\n")

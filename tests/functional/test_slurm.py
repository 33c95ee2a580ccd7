"""Jobs on real SLURM daemons: preempted, requeued and resumed; node ranks and sweeps; preprocessing."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.functional.test_run import BASE
from tests.helpers import slurm
from tests.helpers.training import flags, losses, pretrain

PRETRAIN = str(REPOSITORY / "examples" / "slurm" / "pretrain.sbatch")
PREPROCESS = str(REPOSITORY / "examples" / "slurm" / "preprocess.sbatch")
reason = slurm.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=reason or "")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[slurm.Cluster]:
    cluster = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


def submit(cluster: slurm.Cluster, folder: Path, *words: object, **environment: str) -> str:
    """sbatch from a folder that is not the repository; the job's number."""
    settings = {"MASTER_ADDR": "127.0.0.1", "PANGU_HOME": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    options = ["--parsable", f"--chdir={folder}", f"--output={folder}/%A_%a.out"]
    return cluster.run("sbatch", *options, *map(str, words), **settings | environment).strip()


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))


def test_preempted_job_requeues_itself_and_goes_on(cluster, pool, tmp_path):
    """Two nodes in data parallel; the losses equal those of an uninterrupted run bit for bit."""
    metrics, logs = tmp_path / "metrics.jsonl", tmp_path / "logs"
    run = BASE | dict(train_iters=120, global_batch_size=32, eval_iters=0)
    places = dict(save=tmp_path / "ck", load=tmp_path / "ck", save_interval=1000, metrics_file=metrics)
    job = submit(cluster, tmp_path, "--nodes=2", PRETRAIN, *flags(**run | places), LOG_DIR=str(logs))
    end = time.monotonic() + 400
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < end and cluster.state(job)["JobState"] != "FAILED", output(tmp_path)
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, 600) == "COMPLETED", output(tmp_path)

    assert cluster.state(job)["Restarts"] == "1"
    saved = sorted(path.name for path in (tmp_path / "ck").glob("iter_*"))
    assert len(saved) == 2 and saved[0] < "iter_0000120" == saved[1]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(1, 121))
    assert losses(records) == losses(pretrain(pool, 2, flags(**run)))
    for restart in (0, 1):
        for node in (0, 1):
            assert list(logs.glob(f"restart-{restart}/node-{node}/*/attempt_0/0/stdout.log"))


def test_sweep_gives_each_task_its_flags_and_each_node_its_rank(cluster, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text('echo "$SLURM_ARRAY_TASK_ID: node $NODE_RANK of $NUM_NODES, $GPUS_PER_NODE each, $*"\n')
    (tmp_path / "sweep.txt").write_text("--lr 1e-3\n--lr 2e-3 --seed 5\n")
    job = submit(
        cluster, tmp_path, "--nodes=2", "--array=0-1", PRETRAIN, script, "run %a", SWEEP_FILE="sweep.txt",
        GPUS_PER_NODE="3",
    )  # fmt: skip
    cluster.wait(f"{job}_1", 120), cluster.wait(f"{job}_0", 120)
    expected = [
        f"{task}: node {node} of 2, 3 each, run {task} {given}"
        for task, given in enumerate(("--lr 1e-3", "--lr 2e-3 --seed 5"))
        for node in (0, 1)
    ]
    assert sorted(filter(None, output(tmp_path).split("\n"))) == expected


def test_preprocessing_in_parts_is_one_run(cluster, tmp_path):
    texts = [" ".join(str((7 * i + j) % 250) for j in range(3 + i % 40)) for i in range(400)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = flags(input=corpus, tokenizer_type="NullTokenizer", vocab_size=255, append_eod=True)
    job = submit(cluster, tmp_path, "--ntasks=2", PREPROCESS, *tokens, "--output-prefix", tmp_path / "parts")
    tool = str(REPOSITORY / "tools" / "preprocess_data.py")
    cluster.run(sys.executable, tool, *tokens, "--output-prefix", str(tmp_path / "whole"), "--workers", "1")
    assert cluster.wait(job, 180) == "COMPLETED", output(tmp_path)
    for suffix in ("bin", "idx"):
        whole, parts = (tmp_path / f"{name}_text_document.{suffix}" for name in ("whole", "parts"))
        assert parts.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("parts_0*"))

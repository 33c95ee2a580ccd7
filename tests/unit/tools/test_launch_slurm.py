"""tools/launch_slurm.py: what it checks, and the sbatch command that it would give."""

import importlib.util
import json

import pytest

from tests.conftest import REPOSITORY

SPEC = importlib.util.spec_from_file_location("launch_slurm", REPOSITORY / "tools" / "launch_slurm.py")
launch_slurm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launch_slurm)

RUN = (
    "--model-preset tiny --mock-data --tokenizer-type NullTokenizer --vocab-size 99 --micro-batch-size 1 "
    "--train-iters 10 --lr 1e-3 --save {0} --load {0} --save-interval 5"
)


def launch(capsys, options: str, run: list[str]) -> tuple[int, str, str]:
    code = launch_slurm.main([*options.split(), "--", *run])
    return code, *capsys.readouterr()


def test_dry_run_prints_the_command(capsys, tmp_path):
    options = f"--nodes 2 --gpus-per-node 8 --time 1:00:00 --account a --log-dir {tmp_path} --dry-run --json"
    flags = RUN.format(tmp_path / "c").split() + ["--tensor-model-parallel-size", "4"]
    code, out, _ = launch(capsys, options, flags)
    command = json.loads(out)["command"]
    assert code == 0
    assert command[:3] == ["sbatch", "--parsable", "--nodes=2"] and command[-len(flags) :] == flags
    assert {"--gpus-per-node=8", "--time=1:00:00", "--account=a"} < set(command)
    assert not list(tmp_path.iterdir())


def test_sweep_is_an_array_of_separate_runs(capsys, tmp_path):
    words = RUN.format(tmp_path / "%a").split()
    options = f"--cpus-per-node 2 --log-dir {tmp_path} --dry-run --json --sweep=--seed=1"
    code, out, _ = launch(capsys, options, words)
    assert code == 0
    assert {"--array=0-0", "--cpus-per-task=2"} < set(json.loads(out)["command"])
    code, _, err = launch(capsys, options, RUN.format(tmp_path / "one").split())
    assert code == 2 and "put %a into the path" in err
    code, _, err = launch(capsys, options.replace("--seed=1", "--seed=-1"), words)
    assert code == 2 and "task 0:   - --seed -1: must be between 0 and" in err


@pytest.mark.parametrize(
    ("options", "run", "problem"),
    [
        ("--gpus-per-node 8", "--model-preset tiny", "--micro-batch-size is required"),
        ("--gpus-per-node 8", RUN.replace("--load {0}", ""), "a requeued job goes on from --load"),
        ("--gpus-per-node 8", f"{RUN} --ckpt-step 5", "would go back to --ckpt-step 5 each time"),
        ("--gpus-per-node 3", f"{RUN} --tensor-model-parallel-size 2", "the 3 processes cannot be divided"),
        ("--gpus-per-node 0", RUN, "--gpus-per-node must be at least 1"),
        ("--gpus-per-node 8", "", "after -- give a run script"),
        ("--gpus-per-node 8", "no/such.sh a b", "there is no such run script"),
        ("--gpus-per-node 8", f"{REPOSITORY}/examples/run_1b.sh only", "usage: bash examples/run_1b.sh"),
    ],
)
def test_what_cannot_run_is_not_submitted(capsys, tmp_path, options, run, problem):
    code, out, err = launch(capsys, options, run.format(tmp_path / "c").split())
    assert (code, out) == (2, "")
    assert problem in err


def test_without_slurm(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(capsys, "--gpus-per-node 1", RUN.format(tmp_path / "c").split())
    assert code == 1 and "there is no sbatch on this machine" in err

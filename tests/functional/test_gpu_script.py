"""tests/gpu/run.sh starts, installs missing packages, and writes its results to the given folder.

Its stages are rehearsed by hand: GPU_REHEARSAL=1 bash tests/gpu/run.sh
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def script(*stages: str, **environment: str) -> subprocess.CompletedProcess:
    """Run stages, without a GPU."""
    return subprocess.run(
        ["bash", str(REPOSITORY / "tests" / "gpu" / "run.sh"), *stages],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_stage_that_is_not_there():
    done = script("kernel")
    assert done.returncode == 2 and "no stage kernel, there are: smoke equality kernels" in done.stderr


@pytest.mark.skipif(os.environ.get("TEST_DEVICE", "cpu") != "cpu", reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done():
    done = script("kernels")
    assert done.returncode == 1 and "GPU_REHEARSAL=1" in done.stderr


def test_all_that_a_bare_machine_lacks_is_named(tmp_path):
    """A Python with nothing but itself, and no network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "gpu" / "run.sh", tmp_path / "tests" / "gpu")
    done = subprocess.run(
        ["bash", tmp_path / "tests" / "gpu" / "run.sh", "smoke"],
        env={"PATH": f"{tmp_path}/bare/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    for package in ("megatron-core==0.16.1", "numpy", "psutil", "sentencepiece", "pytest"):
        assert f" {package}" in done.stderr.splitlines()[-1], done.stderr


def test_results_are_where_they_are_wanted(tmp_path):
    done = script("kernels", GPU_REHEARSAL="1", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    kept = (tmp_path / "gpu" / "kernels.txt").read_text()
    assert "test_matches_the_formula" in kept and f"everything is in {tmp_path}/gpu" in done.stdout

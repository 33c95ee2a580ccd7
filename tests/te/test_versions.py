"""The cases of this folder with each Transformer Engine that Megatron-Core accepts.

Each version has a process of its own: an imported Transformer Engine changes what Megatron-Core does. The
newest runs all cases, the older ones some of each kind. By hand:
TEST_ENGINE=2.11.0 python -m pytest tests/te/cases
"""

import os
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_ext.platform import engine
from tests.conftest import REPOSITORY
from tests.te import wheels
from tests.unit.common.test_optional import NONE_USED, said, started

SOME = "tp1-plain or tp2-sequence-parallel or fp32-engine-first or (stays and ours-to-theirs)"


@pytest.fixture(scope="module")
def processes() -> dict[str, subprocess.Popen]:
    """Pytest on the cases, for all versions at the same time."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "tests/te/cases"]
    return {
        version: subprocess.Popen(
            command if version == wheels.VERSIONS[-1] else [*command, "-k", SOME],
            cwd=REPOSITORY,
            env=os.environ | {"TEST_ENGINE": version},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for version in wheels.VERSIONS
        if wheels.folder(version).is_dir()
    }


def test_the_versions_are_those_that_megatron_core_accepts():
    """The dependency as its metadata has it, and the newest of each minor version."""
    wanted = [Requirement(line) for line in metadata.requires("megatron-core")]
    (accepted,) = (each.specifier for each in wanted if each.name == "transformer-engine")
    for version in (*wheels.VERSIONS, "2.8.0", "2.12.0"):
        assert accepted.contains(version) == SpecifierSet(engine.ACCEPTED).contains(version)
        assert accepted.contains(version) == (version in wheels.VERSIONS)


@pytest.mark.parametrize("version", wheels.VERSIONS)
def test_the_cases_pass(processes, version):
    if version not in processes:
        pytest.skip("its wheel is not here: python -m tests.te.wheels")
    output, _ = processes[version].communicate(timeout=300)
    print(output)
    assert processes[version].returncode == 0, "\n".join(output.splitlines()[-200:])


@pytest.mark.parametrize(("device", "gpu"), [("auto", True), ("cpu", True), ("auto", False)])
def test_a_package_without_its_libraries_stops_no_run(device, gpu):
    """The wheel alone, as pip installs it without its other half: its own checks raise RuntimeError."""
    folder = wheels.folder(wheels.VERSIONS[-1])
    if not folder.is_dir():
        pytest.skip("its wheel is not here: python -m tests.te.wheels")
    found, warned = said(started(folder, device, gpu))
    assert found.items() >= NONE_USED.items()
    assert ("transformer_engine is installed, but importing" in warned) == (device == "auto" and gpu)

"""A small checkpoint of ours, saved once, for tests that damage copies of it."""

import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import save_checkpoint
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments

_made: Path | None = None


@pytest.fixture
def saved_once(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of iterations 1 and 2, created by the first test that uses it."""
    global _made
    if _made is None:
        folder = tmp_path_factory.mktemp("saved")
        run = Run(arguments(Layout()))
        for iteration in (1, 2):
            run.train(1)
            save_checkpoint(folder, iteration, run_state=run.run_state, **run.parts)
        _made = folder
    return _made


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(saved_once, tmp_path / "saved")

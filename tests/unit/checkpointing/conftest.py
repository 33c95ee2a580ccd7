"""One small checkpoint of ours, saved once, for tests that break copies of it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.training.checkpointing import save_checkpoint
from tests.helpers import parallel
from tests.helpers.parallel import Layout
from tests.unit.checkpointing.tiny import Run, arguments


@pytest.fixture(scope="package")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with checkpoints of iterations 1 and 2, and the process that made them."""
    folder = tmp_path_factory.mktemp("saved")
    environment = dict(os.environ)
    parallel.join(0, 1, "", "gloo", 60)
    parallel.initialize(Layout())
    run = Run(arguments(Layout()))
    for iteration in (1, 2):
        run.train(1)
        save_checkpoint(folder, iteration, run_state=run.run_state, **run.parts)
    yield folder
    parallel.destroy()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be broken."""
    return shutil.copytree(saved_once, tmp_path / "saved")

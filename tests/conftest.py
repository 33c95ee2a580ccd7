"""Fixtures of all tests: one thread, the CPU unless TEST_DEVICE=cuda, the worker pool."""

import os
import signal

# Before torch or NumPy are imported: no thread pool is ever started in this process, so that the
# worker pool may fork from it, and results do not depend on the number of cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from megatron_ext import platform  # noqa: E402
from tests.helpers import parallel  # noqa: E402
from tests.helpers.pool import Pool  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
_pool: Pool | None = None


def pytest_configure(config: pytest.Config) -> None:
    # Ignored under nohup or behind a script, and then they would be in every run that a test starts.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    platform.activate(os.environ.get("TEST_DEVICE", "cpu"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the pool's server before the first test runs, if any test wants it."""
    global _pool
    wanted = any("pool" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        _pool = Pool()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Workers for distributed tests: ``pool.run(world_size_or_layout, function, *args)``."""
    assert _pool is not None
    yield _pool
    _pool.close()


@pytest.fixture
def single_process() -> Iterator[None]:
    """Megatron-Core initialised in the test's own process, as a world of one."""
    environment = dict(os.environ)
    parallel.join(0, 1, "", "gloo", 60)
    parallel.initialize(parallel.Layout())
    yield
    parallel.destroy()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Corpora, tokenizers and golden runs kept beside the repository; skips where they are not."""
    folder = Path(os.environ.get("PANGU_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("needs the shared data folder (PANGU_SHARED)")
    return folder

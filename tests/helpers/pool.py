"""A pool of worker processes for distributed tests, at about a second a test.

torchrun pays the import of torch and Megatron-Core (seconds) per process and test. Here one
process, the *server*, is forked from pytest after everything heavy was imported and before any
thread was started; it forks the workers, hands them a test function by name, watches the clock,
and replaces all workers after a failure or a hang. Processes: pytest - server - workers.

    def check_sum(start):
        ...                                       # runs on every rank, in a joined process group
        return total

    def test_sum(pool):
        assert pool.run(2, check_sum, 10) == [21, 21]            # one result per rank
        pool.run(Layout(tp=2, pp=2), check_other)                # Megatron-Core initialised as well
"""

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from tests.helpers import parallel
from tests.helpers.parallel import Layout

PRELOAD = (
    "megatron_ext",
    "torch",
    "torch.distributed.checkpoint",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron_ext.training.setup",
    "megatron_ext.training.watchdog",
    "torch._dynamo",  # the first optimizer imports it: a second
)
#: After the first failure the other ranks get this long to fail too, then they are replaced.
GRACE_SECONDS = 2.0


class WorkerError(AssertionError):
    """A function failed on a rank, or did not end in time; the message holds every traceback."""


@dataclass
class _Job:
    layout: Layout | int
    function: Callable
    args: tuple
    kwargs: dict
    store: str | None
    timeout: float
    backend: str

    @property
    def world_size(self) -> int:
        return self.layout if isinstance(self.layout, int) else self.layout.world_size


class Pool:
    """The client of the pool, in the pytest process."""

    def __init__(self) -> None:
        for module in PRELOAD:
            importlib.import_module(module)
        self._connection, theirs = Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _run_to_exit(_Server(theirs, close=self._connection).serve)
        theirs.close()

    def run(
        self,
        layout: Layout | int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 120.0,
        backend: str = "gloo",
        grace: float = GRACE_SECONDS,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank of a new process group.

        ``layout`` is the number of processes, or a :class:`Layout`, which initialises Megatron-Core
        too (seed 1234). ``function`` is a module-level function; arguments and results are pickled.

        Returns the results in the order of the ranks. Raises :class:`WorkerError` with the traceback
        of each rank that failed within ``grace`` seconds of the first, or with the stack of each rank
        still running after ``timeout`` seconds (or after a ``grace`` that was given).
        """
        with tempfile.TemporaryDirectory(prefix="pool-") as folder:
            job = _Job(layout, function, args, kwargs, f"{folder}/store", timeout, backend)
            self._connection.send((job.world_size, timeout, grace, pickle.dumps(job)))
            try:
                replies, problems = self._connection.recv()
            except EOFError:
                raise WorkerError("the process that serves the worker pool died") from None
        if problems:
            raise WorkerError("\n\n".join(problems))
        return [pickle.loads(reply) for reply in replies]

    def close(self) -> None:
        """End the server and with it all workers."""
        self._connection.close()
        os.waitpid(self._pid, 0)


@dataclass
class _Worker:
    pid: int
    connection: Connection
    stack_file: Any


@dataclass
class _Server:
    """Forks workers and passes jobs on; imports nothing and computes nothing, so forking stays safe."""

    parent: Connection
    close: Connection
    workers: list[_Worker] = field(default_factory=list)

    def serve(self) -> None:
        self.close.close()
        gc.freeze()
        try:
            while True:
                self.parent.send(self._run(*self.parent.recv()))
        except EOFError:
            pass
        finally:
            self._kill_workers()

    def _run(
        self, world_size: int, timeout: float, grace: float, job: bytes
    ) -> tuple[list[bytes], list[str]]:
        while len(self.workers) < world_size:
            self.workers.append(self._fork_worker())
        ranks = {worker.connection: rank for rank, worker in enumerate(self.workers[:world_size])}
        for connection, rank in ranks.items():
            connection.send_bytes(pickle.dumps((rank, job)))
        replies, problems = self._collect(ranks, timeout, grace)
        if problems:
            self._kill_workers()
        return [replies.get(rank, b"") for rank in range(world_size)], problems

    def _collect(
        self, ranks: dict[Connection, int], timeout: float, grace: float
    ) -> tuple[dict[int, bytes], list[str]]:
        """Wait for every rank; returns the results by rank and what went wrong, in order of time."""
        replies: dict[int, bytes] = {}
        problems: list[str] = []
        waiting, world_size = dict(ranks), len(ranks)
        left, waited = timeout, 0.0
        while waiting:
            before = time.monotonic()
            ready = wait([*waiting, self.parent], min(1.0, left))
            # While the whole machine stands still, the ranks do too: of a pause two seconds count.
            passed = min(time.monotonic() - before, 2.0)
            left, waited = max(0.0, left - passed), waited + passed
            if self.parent in ready:  # a job is answered before the next is sent: pytest has gone
                raise EOFError
            if not ready:
                if left:
                    continue
                # Those that outlive the first failure by the usual grace are just waiting for it.
                if not problems or grace > GRACE_SECONDS:
                    problems += [self._stack(rank, world_size, waited) for rank in waiting.values()]
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    failure, reply = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    failure, reply = f"the process died{self._exit_reason(rank)}", b""
                replies[rank] = reply
                if failure:
                    problems.append(f"rank {rank} of {world_size} failed: {failure}")
                    left = min(left, grace)
        return replies, problems

    def _fork_worker(self) -> _Worker:
        ours, theirs = Pipe()
        stack_file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        pid = os.fork()
        if pid == 0:
            for connection in (ours, self.parent, *(worker.connection for worker in self.workers)):
                connection.close()
            _run_to_exit(lambda: _work(theirs, stack_file))
        theirs.close()
        return _Worker(pid, ours, stack_file)

    def _exit_reason(self, rank: int) -> str:
        _, status = os.waitpid(self.workers[rank].pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return f" with exit code {code}" if code >= 0 else f" by {signal.Signals(-code).name}"

    def _stack(self, rank: int, world_size: int, seconds: float) -> str:
        worker = self.workers[rank]
        os.kill(worker.pid, signal.SIGUSR2)
        time.sleep(0.2)
        worker.stack_file.seek(0)
        stack = worker.stack_file.read().decode(errors="replace")
        return f"rank {rank} of {world_size} did not end within {seconds:.0f} s; it is at\n{stack}"

    def _kill_workers(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        for worker in self.workers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(worker.pid, 0)
            worker.connection.close()
            worker.stack_file.close()
        self.workers.clear()


def _run_to_exit(body: Callable[[], None]) -> NoReturn:
    """Run a forked process and exit without pytest's clean-up, which is the parent's."""
    # Ctrl-C reaches the whole group: pytest handles it, and its end closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = 1
    try:
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(connection: Connection, stack_file: Any) -> None:
    """The loop of a worker: receive a job, run it, reply with (failure, result)."""
    import torch

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2, file=stack_file)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # Megatron-Core makes dozens of groups, most never used: connect at the first message only.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    with contextlib.suppress(EOFError):
        while True:
            rank, job = pickle.loads(connection.recv_bytes())
            environment, folder = dict(os.environ), os.getcwd()
            outcome = _attempt(rank, job)
            # A failure is told first: to leave a group whose processes have gone may take until its timeout.
            if outcome[0]:
                connection.send_bytes(pickle.dumps(outcome))
            _clean_up(environment, folder)
            if not outcome[0]:
                connection.send_bytes(pickle.dumps(outcome))


def _attempt(rank: int, pickled_job: bytes) -> tuple[str, bytes]:
    """Run a job: (the traceback or nothing, the pickled result)."""
    try:
        job: _Job = pickle.loads(pickled_job)
        # The group's own timeout is longer: the server reports a hang first, with stacks.
        parallel.join(rank, job.world_size, job.store, job.backend, 2 * job.timeout + 10)
        if isinstance(job.layout, Layout):
            parallel.initialize(job.layout)
        return "", pickle.dumps(job.function(*job.args, **job.kwargs))
    except BaseException as error:
        return "".join(traceback.format_exception(error)), b""


def _clean_up(environment: dict[str, str], folder: str) -> None:
    """Restore the state of the process before the job."""
    parallel.destroy()
    gc.collect()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)

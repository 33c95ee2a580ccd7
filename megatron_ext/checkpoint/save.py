"""Saving: everything is written aside, checked in, put in place, and only then announced."""

import io
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megatron_ext import platform
from megatron_ext.checkpoint import content, folders, writer
from megatron_ext.checkpoint.errors import CheckpointError, on_rank_0, together
from megatron_ext.checkpoint.folders import Retain
from megatron_ext.checkpoint.integrity import CHECKSUMS, describe, marker
from megatron_ext.checkpoint.lock import saving_into
from megatron_ext.config import RunConfig
from megatron_ext.config.output import CheckpointConfig
from megatron_ext.platform.collective import gather

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: The content of ``metadata.json``.
FORMAT = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()


def save_checkpoint(
    save_dir: str | Path,
    iteration: int,
    *,
    model: list[nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: content.Scheduler | None,
    run_state: dict[str, Any],
    run: RunConfig,
    rng_states: bool = True,
    retain: Retain | None = None,
    async_save: bool = False,
    wait_for_copies: bool = True,
    buffers: writer.Buffers | None = None,
) -> "PendingSave":
    """Write ``SAVE/iter_{iteration}`` and make it the one to continue from; collective.

    Megatron-LM's torch_dist format, loadable by it and at any layout. ``run_state`` is returned by
    :func:`load_checkpoint`: plain values only. Its "checkpoints" are the iterations in ``save_dir`` that
    this one goes on from (by default all below): it falls back to them if it is damaged, and of them
    ``retain`` says which go (by default what ``--save-retain-interval`` and ``--keep-latest-k`` say).
    ``--no-save-optim`` and ``--no-save-rng`` in ``run`` leave parts out.

    With ``async_save`` the call returns as soon as all tensors were copied, and the result's
    ``finish`` must be called, on all ranks alike, for the checkpoint to appear. Without
    ``wait_for_copies`` it returns at once, and the result's ``copied`` must be called before any of
    the tensors may change. ``buffers``, an empty dict at first, keeps the memory of the copies for the
    next save.

    Raises:
        CheckpointError: on every rank, if any could not do its part, or another run saves there;
            nothing is left behind and older checkpoints are as they were.
    """
    save_dir = Path(save_dir)
    retain = retain or Retain(run.checkpoint.save_retain_interval, run.checkpoint.keep_latest_k)
    pending = PendingSave(save_dir, iteration, folders.working_dir(save_dir, iteration), retain)
    try:
        before = pending.prepare(run_state.get("checkpoints"))
        run_state = run_state | {"checkpoints": before}
        state = content.common_part(iteration, run_state, run, scheduler)
        state |= _sharded_part(model, optimizer, run.checkpoint, rng_states)
        sharded, common = save_preprocess(state, preprocess_common_before_consistancy_check=lambda common: {})
        if run.checkpoint.ckpt_fully_parallel_save:
            _divide_among_replicas(sharded)
        shard_plan = writer.plan(sharded)
        # The common part is serialised now, as the scheduler's and optimizer's values move on.
        if async_save:
            pending.start_in_background(shard_plan, serialised(common), buffers)
            if wait_for_copies:
                pending.copied()
        else:
            pending.start(shard_plan, serialised(common))
            pending.finish()
    except BaseException:
        pending.abandon()
        raise
    return pending


def _sharded_part(
    model: list[nn.Module], optimizer: MegatronOptimizer | None, config: CheckpointConfig, rng_states: bool
) -> dict[str, Any]:
    if config.no_save_optim:
        optimizer = None
    metadata = content.content_metadata(optimizer, config)
    state = content.model_part(model, metadata)
    if optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        content.make_state(optimizer)
        with torch.no_grad():
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=metadata)
    if rng_states and not config.no_save_rng:
        state["rng_state"] = content.rng_object(content.gather_rng())
    force_all_tensors_to_non_fp8(state)  # a checkpoint is read without Transformer Engine too
    return state | {"content_metadata": metadata}


def _divide_among_replicas(sharded: dict[str, Any]) -> None:
    """Let each data parallel rank write a share of what they all hold; collective."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return
    shares = determine_main_replica_uniform_distribution(sharded, group)
    distribute_main_replicas_with_precomputed_distribution(sharded, group, shares)


def serialised(common: dict[str, Any]) -> bytes:
    """The content of ``common.pt``."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()


@dataclass
class PendingSave:
    """A checkpoint being written; it appears when ``finish`` has returned on all ranks."""

    save_dir: Path
    iteration: int
    working: Path
    retain: Retain
    _before: list[int] = field(default_factory=list)
    #: On rank 0, what is given back in the end: the lock, after the working folder if it is still there.
    _mine: ExitStack = field(default_factory=ExitStack)
    _metadata: object = None
    _copying: Future[writer.ShardPlan] | None = None
    _job: Future[Any] | None = None
    _publishing: bool = False
    _threads: ThreadPoolExecutor | None = None

    def prepare(self, before: list[int] | None) -> list[int]:
        """Make the working folder, under the lock of ``save_dir``; collective.

        Returns those of ``before`` that lie there (None: of all), from which this checkpoint goes on.
        """

        def begin() -> list[int]:
            self._mine.enter_context(saving_into(self.save_dir))
            folders.prepare(self.save_dir, self.iteration)
            self._mine.callback(shutil.rmtree, self.working, ignore_errors=True)
            older = [i for i in folders.list_iterations(self.save_dir) if i < self.iteration]
            return [i for i in older if before is None or i in before]

        self._before = on_rank_0(f"prepare --save {self.save_dir}", begin)
        together(f"write to --save {self.save_dir}", lambda: folders.require_visible(self.working))
        return self._before

    def start(self, shard_plan: writer.ShardPlan, common: bytes) -> None:
        """Write this rank's files; communicates nothing."""
        self._metadata = shard_plan.metadata
        self._job = _done_now(lambda: self._write(shard_plan, common))

    def start_in_background(
        self, shard_plan: writer.ShardPlan, common: bytes, buffers: writer.Buffers | None = None
    ) -> None:
        """Begin to copy the tensors, and then to write this rank's files; communicates nothing."""
        self._metadata = shard_plan.metadata
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        beside = platform.side_stream()
        copying = self._copying = self._threads.submit(writer.snapshot, shard_plan, buffers, beside)
        self._job = self._threads.submit(lambda: self._write(copying.result(), common))

    def copied(self) -> None:
        """Wait until all tensors were copied and may change; communicates nothing.

        If copying failed, the writing of this rank has failed too, and ``finish`` tells all.
        """
        if self._copying is not None:
            wait([self._copying])

    def _write(self, shard_plan: writer.ShardPlan, common: bytes) -> writer.Written:
        written = writer.write(shard_plan, self.working)
        if torch.distributed.get_rank() == 0:
            for name, data in (("common.pt", common), ("metadata.json", FORMAT)):
                folders.write_durably(self.working / name, data)
                written.files[name] = describe(data)
        return written

    def ready(self) -> bool:
        """Whether the checkpoint is complete, so that ``finish`` will not wait; collective.

        To be asked again and again: once every rank has written, the first rank begins to put the
        checkpoint in place, in the background too.
        """
        if not all(gather(self._job is None or self._job.done())):
            return False
        if self._job is not None and not self._publishing:
            self._begin_to_publish(self._job)
            return False
        return True

    def finish(self) -> None:
        """Wait for every rank's files, put the checkpoint in place and announce it; collective.

        Does nothing the second time. Raises CheckpointError on every rank if any failed.
        """
        if self._job is None:
            return
        if not self._publishing:
            self._begin_to_publish(self._job)
        job, self._job = self._job, None
        self._guarded(f"put checkpoint {self.iteration} into {self.save_dir}", job.result)
        self._mine.close()
        if self._threads:
            self._threads.shutdown()

    def _begin_to_publish(self, job: Future[Any]) -> None:
        self._publishing = True
        written = self._guarded(f"write checkpoint {self.iteration} to {self.save_dir}", job.result)
        everything = gather(written)
        action = partial(self._publish, everything) if torch.distributed.get_rank() == 0 else lambda: None
        self._job = self._threads.submit(action) if self._threads else _done_now(action)

    def _guarded(self, doing: str, action: Callable[[], T]) -> T:
        """``together``, giving up on all ranks if it fails on any."""
        try:
            return together(doing, action)
        except BaseException:
            self.abandon()
            if self._threads:
                self._threads.shutdown()
            raise

    def _publish(self, written: list[writer.Written]) -> None:
        metadata = writer.dump_metadata(self._metadata, written)
        folders.write_durably(self.working / ".metadata", metadata)
        files = {name: entry for each in written for name, entry in each.files.items()}
        files[".metadata"] = describe(metadata)
        folders.write_durably(self.working / CHECKSUMS, marker(self.iteration, files))
        folders.publish(self.save_dir, self.iteration)
        for iteration in self.retain.superseded(self._before, self.iteration):
            try:
                folders.remove(self.save_dir, iteration)
            except OSError as error:
                logger.warning("checkpoint %d could not be removed: %s", iteration, error)

    def abandon(self) -> None:
        """Give up: remove what this save wrote; communicates nothing."""
        self._job = None
        self._mine.close()


def _done_now(action: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(action())
    except Exception as error:
        future.set_exception(error)
    return future


__all__ = ["CheckpointError", "PendingSave", "Retain", "save_checkpoint"]

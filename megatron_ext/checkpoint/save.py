"""Saves checkpoints: written to a working folder, published by a rename, then named by the tracker."""

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
    """Write ``SAVE/iter_{iteration}`` and make it the checkpoint to resume from; collective.

    Uses Megatron-LM's torch_dist format, which Megatron-LM can load and which any layout can. ``run_state``,
    plain values only, is returned by :func:`load_checkpoint`. Its "checkpoints" are the predecessors of this
    checkpoint in ``save_dir`` (by default all earlier ones): loading falls back to them if this one is
    damaged, and ``retain`` selects which of them to remove (by default ``--save-retain-interval`` and
    ``--keep-latest-k``). ``--no-save-optim`` and ``--no-save-rng`` in ``run`` leave parts out.

    With ``async_save`` the call returns as soon as all tensors are copied, and the checkpoint is published by
    the result's ``finish``, which must be called on all ranks. Without ``wait_for_copies`` it returns at
    once, and the result's ``copied`` must be called before any of the tensors changes. ``buffers``, initially
    an empty dict, keeps the memory of the copies for the next save.

    Raises:
        CheckpointError: on every rank, if any rank failed, or another run saves there; nothing is left behind
            and older checkpoints are unchanged.
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
        # Serialised now, because the values of scheduler and optimizer change later.
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
    force_all_tensors_to_non_fp8(state)  # so that it can be read without Transformer Engine
    return state | {"content_metadata": metadata}


def _divide_among_replicas(sharded: dict[str, Any]) -> None:
    """Divide the writing of replicated shards among the data parallel ranks; collective."""
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
    """A checkpoint being written; it is published when ``finish`` has returned on all ranks."""

    save_dir: Path
    iteration: int
    working: Path
    retain: Retain
    _before: list[int] = field(default_factory=list)
    #: On rank 0, released at the end: the working folder if it still exists, then the lock.
    _resources: ExitStack = field(default_factory=ExitStack)
    _metadata: object = None
    _copying: Future[writer.ShardPlan] | None = None
    _job: Future[Any] | None = None
    _publishing: bool = False
    _threads: ThreadPoolExecutor | None = None

    def prepare(self, before: list[int] | None) -> list[int]:
        """Create the working folder, under the lock of ``save_dir``; collective.

        Returns the predecessors: those of ``before`` (None: of all checkpoints) that are in the folder.
        """

        def begin() -> list[int]:
            self._resources.enter_context(saving_into(self.save_dir))
            folders.prepare(self.save_dir, self.iteration)
            self._resources.callback(shutil.rmtree, self.working, ignore_errors=True)
            older = [i for i in folders.list_iterations(self.save_dir) if i < self.iteration]
            return [i for i in older if before is None or i in before]

        self._before = on_rank_0(f"prepare --save {self.save_dir}", begin)
        together(f"write to --save {self.save_dir}", lambda: folders.require_visible(self.working))
        return self._before

    def start(self, shard_plan: writer.ShardPlan, common: bytes) -> None:
        """Write this rank's files; does not communicate."""
        self._metadata = shard_plan.metadata
        self._job = _completed(lambda: self._write(shard_plan, common))

    def start_in_background(
        self, shard_plan: writer.ShardPlan, common: bytes, buffers: writer.Buffers | None = None
    ) -> None:
        """Start copying the tensors and then writing this rank's files; does not communicate."""
        self._metadata = shard_plan.metadata
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        side_stream = platform.side_stream()
        copying = self._copying = self._threads.submit(writer.snapshot, shard_plan, buffers, side_stream)
        self._job = self._threads.submit(lambda: self._write(copying.result(), common))

    def copied(self) -> None:
        """Wait until all tensors are copied and may change; does not communicate.

        If copying failed, this rank's write has failed too, and ``finish`` raises on all ranks.
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

        To be polled: once every rank has written its files, rank 0 starts to publish the checkpoint,
        also in the background.
        """
        if not all(gather(self._job is None or self._job.done())):
            return False
        if self._job is not None and not self._publishing:
            self._start_publishing(self._job)
            return False
        return True

    def finish(self) -> None:
        """Wait for every rank's files and publish the checkpoint; collective.

        Does nothing when called again. Raises CheckpointError on every rank if any failed.
        """
        if self._job is None:
            return
        if not self._publishing:
            self._start_publishing(self._job)
        job, self._job = self._job, None
        self._guarded(f"put checkpoint {self.iteration} into {self.save_dir}", job.result)
        self._resources.close()
        if self._threads:
            self._threads.shutdown()

    def _start_publishing(self, job: Future[Any]) -> None:
        self._publishing = True
        written = self._guarded(f"write checkpoint {self.iteration} to {self.save_dir}", job.result)
        everything = gather(written)
        action = partial(self._publish, everything) if torch.distributed.get_rank() == 0 else lambda: None
        self._job = self._threads.submit(action) if self._threads else _completed(action)

    def _guarded(self, doing: str, action: Callable[[], T]) -> T:
        """``together``, and abandon the save on all ranks if it fails on any."""
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
        """Remove what this save wrote; does not communicate."""
        self._job = None
        self._resources.close()


def _completed(action: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(action())
    except Exception as error:
        future.set_exception(error)
    return future


__all__ = ["CheckpointError", "PendingSave", "Retain", "save_checkpoint"]

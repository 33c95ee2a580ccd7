"""Checkpoints in Megatron-LM's torch_dist format: atomic, checked, and safe to read."""

from megatron_ext.checkpoint.errors import CheckpointError, DamagedCheckpoint
from megatron_ext.checkpoint.folders import (
    Retain,
    checkpoint_dir,
    clean_up,
    latest_iteration,
    list_iterations,
)
from megatron_ext.checkpoint.found import outputs_of
from megatron_ext.checkpoint.integrity import weights_sha256
from megatron_ext.checkpoint.load import (
    LoadedState,
    OpenedCheckpoint,
    load_checkpoint,
    open_checkpoint,
    read_checkpoint_args,
)
from megatron_ext.checkpoint.lock import only_recording_in, only_run_in
from megatron_ext.checkpoint.save import PendingSave, save_checkpoint

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "LoadedState",
    "OpenedCheckpoint",
    "PendingSave",
    "Retain",
    "checkpoint_dir",
    "clean_up",
    "latest_iteration",
    "list_iterations",
    "load_checkpoint",
    "only_recording_in",
    "only_run_in",
    "open_checkpoint",
    "outputs_of",
    "read_checkpoint_args",
    "save_checkpoint",
    "weights_sha256",
]

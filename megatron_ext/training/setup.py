"""Builds the trainer from the configuration, at the position where the run stopped."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_ext import platform
from megatron_ext.arguments.stages import at_its_longest
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint import (
    CheckpointError,
    list_iterations,
    load_checkpoint,
    open_checkpoint,
)
from megatron_ext.checkpoint.errors import on_rank_0
from megatron_ext.config import RunConfig, describe, footprint
from megatron_ext.kernels import cross_entropy
from megatron_ext.models.builder import build_model, ddp_config, regularized, wrap_for_training
from megatron_ext.models.config import transformer_config
from megatron_ext.platform.collective import on_every_rank, print_rank_0
from megatron_ext.tokenizer import Tokenizer, build_tokenizer
from megatron_ext.training.bad_numbers import BadNumberPolicy
from megatron_ext.training.callbacks import Callback, Callbacks, GarbageCollection
from megatron_ext.training.continuing import Start, settle
from megatron_ext.training.distillation import OnlineTeacher
from megatron_ext.training.loop import Trainer
from megatron_ext.training.optimizer import build_optimizer, optimizer_config
from megatron_ext.training.profiling import Profiler
from megatron_ext.training.recording import online_recorder
from megatron_ext.training.reporting import Reporter
from megatron_ext.training.rounds import build_round_datasets, enter_round, open_round
from megatron_ext.training.saving import Saver
from megatron_ext.training.schedule import Schedule, build_scheduler, without_a_rate
from megatron_ext.training.stages import StageChange, enter_stage
from megatron_ext.training.state import Progress
from megatron_ext.training.stored_teacher import stored_teacher
from megatron_ext.training.task_scores import TaskScores
from megatron_ext.training.teacher import load_teacher


def build_trainer(run: RunConfig) -> Trainer:
    """Build tokenizer, checkpoint, data, model and optimizer, in this order; a collective call.

    Problems with the checkpoint or the data are therefore found before the model is built.
    """
    tokenizer = on_every_rank(lambda: build_tokenizer(run.tokenizer))
    print_rank_0(settle_vocabulary(run, tokenizer))

    warn_about_memory(run)

    start, index = find_start(run), open_round(run, tokenizer)
    goes_on_from = start.folder if start.goes_on else None
    if run.checkpoint.save and not run.validation.skip_train:
        claim_save_folder(run.checkpoint.save, start.progress, goes_on_from)
    new_round = enter_round(start.progress, goes_on_from, index, run)
    stages = enter_stage(start, run)
    settle(start, run, tokenizer, index, new_round)
    datasets = build_round_datasets(run, tokenizer, start.progress, index)
    stage_change = None
    if stages and not run.validation.skip_train:
        stage_change = StageChange(stages, run, tokenizer, datasets, start.progress.round_start)
        datasets = stage_change.datasets()

    if run.layers.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    config = transformer_config(run)
    chunks = regularized(build_model(config, run), run.optimizer)
    model = wrap_for_training(chunks, config, ddp_config(run))
    optimizer = build_optimizer(optimizer_config(run), model)
    scheduler = build_scheduler(optimizer, run.schedule, run.optimizer)
    print_rank_0(f" model: {count_parameters(model):,} parameters on this rank; device {platform.activate()}")

    load(start, run, model, optimizer, scheduler)
    idle = min(without_a_rate(scheduler, run), run.training.train_iters - start.progress.iteration)
    if idle > 0 and not run.validation.skip_train:
        print_rank_0(
            f"WARNING: the learning rate is 0 in the last {idle} iterations, because the schedule ends "
            "before them: give a longer one, or --min-lr"
        )
    teacher = OnlineTeacher(load_teacher(run, tokenizer)) if run.distillation.is_taught else None
    recorder, datasets = online_recorder(run, tokenizer, datasets, start.progress)
    stored, datasets = stored_teacher(run, tokenizer, datasets, start.progress)
    token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=platform.current_device())
    of_data = (stage_change, teacher or stored, recorder)
    hooks = callbacks(run, model, optimizer, scheduler, datasets[0], start.progress, tokenizer, of_data)
    return Trainer(run, model, optimizer, scheduler, datasets, token_bytes, hooks, start.progress)


def callbacks(
    run: RunConfig,
    model: list[nn.Module],
    optimizer: Any,
    scheduler: Any,
    training_set: Any,
    progress: Progress,
    tokenizer: Tokenizer,
    of_data: Sequence[Callback | None],
) -> Callbacks:
    """The callbacks of the loop, in call order; ``of_data`` decide what is read, and read along."""
    optional: list[Callback | None] = [
        *of_data,
        BadNumberPolicy(run, training_set),
        GarbageCollection(run.training),
        Profiler(run),
        Saver(run, model, optimizer, scheduler, progress.iteration),
        Reporter(run, progress.iteration),
        TaskScores(run, tokenizer, model) if run.validation.eval_tasks else None,
    ]
    return Callbacks(callback for callback in optional if callback is not None)


def warn_about_memory(run: RunConfig) -> None:
    """Warn if weights, optimizer state and activations are estimated not to fit into memory."""
    run = at_its_longest(run)
    dtype, device = run.precision.params_dtype, platform.current_device()
    kernels = cross_entropy.supports(torch.empty(0, dtype=dtype, device=device))
    layout = replace(describe.layout_of(run), kernels=kernels)
    needed = sum(footprint.memory(run.model, layout).values()) / 2**30
    available = platform.device_memory_bytes() / 2**30
    if needed > available:
        print_rank_0(
            f"WARNING: this layout needs about {needed:.1f} GiB a device, and {available:.1f} GiB are there; "
            "tools/plan_run.py --suggest lists layouts that fit"
        )


def find_start(run: RunConfig) -> Start:
    """Find the newest checkpoint, if any, and the progress of the run there; a collective call.

    A run without a checkpoint of its own takes the weights of ``--pretrained-checkpoint``; a round that
    continues (``--round-schedule continue``) also takes the optimizer state and the progress from there.
    """
    if run.checkpoint.load is not None:
        opened = open_checkpoint(run.checkpoint.load, run)
        if opened is not None:
            return Start(opened, run.checkpoint.load, goes_on=not run.checkpoint.finetune)
        if run.checkpoint.exit_on_missing_checkpoint:
            raise FileNotFoundError(
                f"--load {run.checkpoint.load}: no checkpoint found (--exit-on-missing-checkpoint)"
            )
    if run.checkpoint.pretrained_checkpoint is not None:
        folder = run.checkpoint.pretrained_checkpoint
        opened = open_checkpoint(folder, run)
        if opened is None:
            raise FileNotFoundError(f"--pretrained-checkpoint {folder}: no checkpoint found")
        return Start(
            opened,
            folder,
            goes_on=run.rounds.round_index is not None and run.rounds.round_schedule == "continue",
        )
    if run.checkpoint.load is not None:
        print_rank_0(f" no checkpoint in {run.checkpoint.load}: starting from the initial weights")
    return Start()


def claim_save_folder(save: str, progress: Progress, loaded_from: str | None) -> None:
    """Ensure that the run will not replace checkpoints of another run; a collective call.

    Raises:
        CheckpointError: on every rank, if --save holds checkpoints of later iterations than ``progress``,
            which was not loaded from there.
    """
    goes_on = loaded_from is not None and os.path.realpath(loaded_from) == os.path.realpath(save)
    if not goes_on:
        progress.checkpoints = []

    def check() -> None:
        ahead = [i for i in list_iterations(save) if i > progress.iteration]
        if ahead and goes_on:
            print_rank_0(
                f" going back to iteration {progress.iteration}: the checkpoints of {ahead} in "
                f"{save} stay, each until this run has saved the same iteration"
            )
        elif ahead:
            raise CheckpointError(
                f"it holds the checkpoints of {ahead}, which this run, starting at iteration "
                f"{progress.iteration}, would replace; --load {save} goes on from them, and "
                "to start over give --save an empty or new folder"
            )

    on_rank_0(f"use --save {save}", check)


def load(
    start: Start, run: RunConfig, model: list[nn.Module], optimizer: MegatronOptimizer, scheduler: Schedule
) -> None:
    """Load the initial state of the run: a whole checkpoint, or only its weights; a collective call."""
    if start.checkpoint is None or start.folder is None:
        return
    load_checkpoint(
        start.folder,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        run=run,
        opened=start.checkpoint,
        finetune=not start.goes_on or run.checkpoint.finetune,
    )


def count_parameters(model: list[nn.Module]) -> int:
    """Number of parameters on this rank."""
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())

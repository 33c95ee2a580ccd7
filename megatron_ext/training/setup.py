"""From arguments to a trainer that stands where the run stopped last."""

import os
from argparse import Namespace

import torch

from megatron_ext import platform
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.checkpoint import (
    CheckpointError,
    list_iterations,
    load_checkpoint,
    open_checkpoint,
)
from megatron_ext.checkpoint.errors import on_rank_0
from megatron_ext.config import describe
from megatron_ext.models.builder import build_model, ddp_config, wrap_for_training
from megatron_ext.models.config import transformer_config
from megatron_ext.platform.collective import on_every_rank, print_rank_0
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.training.continuing import Start, settle
from megatron_ext.training.loop import Progress, Trainer
from megatron_ext.training.optimizer import build_optimizer, optimizer_config
from megatron_ext.training.recording import online_recorder
from megatron_ext.training.rounds import build_round_datasets, enter_round, open_round
from megatron_ext.training.schedule import build_scheduler, without_a_rate


def build_trainer(args: Namespace) -> Trainer:
    """Tokenizer, checkpoint, data, model and optimizer, in this order; a collective call.

    What can be wrong with a checkpoint's run or with the data is found before there is a model.
    """
    tokenizer = on_every_rank(lambda: build_tokenizer(args))
    print_rank_0(settle_vocabulary(args, tokenizer))

    warn_about_memory(args)

    start, index = find_start(args), open_round(args, tokenizer)
    goes_on_from = start.folder if start.goes_on else None
    claim_save_folder(args, start.progress, goes_on_from)
    new_round = enter_round(start.progress, goes_on_from, index, args)
    settle(start, args, tokenizer, index, new_round)
    datasets = build_round_datasets(args, tokenizer, start.progress, index)

    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    config = transformer_config(args)
    model = wrap_for_training(build_model(config, args), config, ddp_config(args))
    optimizer = build_optimizer(optimizer_config(args), model)
    scheduler = build_scheduler(optimizer, args)
    print_rank_0(f" model: {count_parameters(model):,} parameters on this rank; device {platform.activate()}")

    load(start, args, model, optimizer, scheduler)
    idle = min(without_a_rate(scheduler, args), args.train_iters - start.progress.iteration)
    if idle > 0 and not args.skip_train:
        print_rank_0(
            f"WARNING: the learning rate is 0 in the last {idle} iterations, because the schedule ends "
            "before them: give a longer one, or --min-lr"
        )
    recorder, datasets = online_recorder(args, tokenizer, datasets, start.progress)
    token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=platform.current_device())
    return Trainer(args, model, optimizer, scheduler, datasets, token_bytes, start.progress, recorder)


def warn_about_memory(args: Namespace) -> None:
    """Say so before the start where the model, its optimizer and its activations look too large."""
    shape = describe.shape_of(args, args.padded_vocab_size)
    needed = sum(describe.memory(shape, describe.layout_of(args)).values()) / 2**30
    there = platform.device_memory_bytes() / 2**30
    if needed > there:
        print_rank_0(
            f"WARNING: this layout needs about {needed:.1f} GiB a device, and {there:.1f} GiB are there; "
            "tools/plan_run.py --suggest lists layouts that fit"
        )


def find_start(args: Namespace) -> Start:
    """The newest checkpoint if there is one, and how far the run then is; a collective call.

    ``--pretrained-checkpoint`` gives weights to a run that has no checkpoint of its own yet, and all
    it holds to a round that continues (``--round-schedule continue``).
    """
    if args.load is not None:
        opened = open_checkpoint(args.load, args)
        if opened is not None:
            return Start(opened, args.load, goes_on=not args.finetune)
        if args.exit_on_missing_checkpoint:
            raise FileNotFoundError(f"--load {args.load}: no checkpoint found (--exit-on-missing-checkpoint)")
    if args.pretrained_checkpoint is not None:
        folder = args.pretrained_checkpoint
        opened = open_checkpoint(folder, args)
        if opened is None:
            raise FileNotFoundError(f"--pretrained-checkpoint {folder}: no checkpoint found")
        return Start(
            opened, folder, goes_on=args.round_index is not None and args.round_schedule == "continue"
        )
    if args.load is not None:
        print_rank_0(f" no checkpoint in {args.load}: starting from the initial weights")
    return Start()


def claim_save_folder(args: Namespace, progress: Progress, loaded_from: str | None) -> None:
    """See to it that what the run will save replaces no checkpoint unasked; a collective call.

    Raises:
        CheckpointError: on every rank, if --save holds checkpoints of later iterations than ``progress``,
            which does not come from there.
    """
    if not args.save or args.skip_train:
        return
    goes_on = loaded_from is not None and os.path.realpath(loaded_from) == os.path.realpath(args.save)
    if not goes_on:
        progress.checkpoints = []

    def look() -> None:
        ahead = [i for i in list_iterations(args.save) if i > progress.iteration]
        if ahead and goes_on:
            print_rank_0(
                f" going back to iteration {progress.iteration}: the checkpoints of {ahead} in {args.save} "
                "stay, each until this run has saved the same iteration"
            )
        elif ahead:
            raise CheckpointError(
                f"it holds the checkpoints of {ahead}, which this run, starting at iteration "
                f"{progress.iteration}, would replace; --load {args.save} goes on from them, and to start "
                "over give --save an empty or new folder"
            )

    on_rank_0(f"use --save {args.save}", look)


def load(start: Start, args: Namespace, model: list, optimizer, scheduler) -> None:
    """Load what the run begins with: a whole checkpoint, or its weights alone; a collective call."""
    if start.checkpoint is None:
        return
    if not start.goes_on:
        args = Namespace(**vars(args) | {"finetune": True})
    load_checkpoint(
        start.folder,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        args=args,
        opened=start.checkpoint,
    )


def count_parameters(model: list) -> int:
    """Number of parameters this rank holds."""
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())

"""From arguments to a trainer that stands where the run stopped last."""

import os
from argparse import Namespace

import torch

from megatron_ext import platform
from megatron_ext.arguments.configs import ddp_config, optimizer_config, transformer_config
from megatron_ext.arguments.vocabulary import settle_vocabulary
from megatron_ext.data.agree import on_every_rank
from megatron_ext.models import describe
from megatron_ext.models.builder import build_model, wrap_for_training
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.training.checkpointing import CheckpointError, list_iterations, load_checkpoint
from megatron_ext.training.checkpointing.errors import on_rank_0
from megatron_ext.training.distributed import print_rank_0
from megatron_ext.training.loop import Progress, Trainer
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.recording import online_recorder
from megatron_ext.training.rounds import build_round_datasets, enter_round, open_round
from megatron_ext.training.schedule import build_scheduler


def build_trainer(args: Namespace) -> Trainer:
    """Tokenizer, model, optimizer, checkpoint and data, in this order; a collective call."""
    tokenizer = on_every_rank(lambda: build_tokenizer(args))
    print_rank_0(settle_vocabulary(args, tokenizer))

    warn_about_memory(args)

    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    config = transformer_config(args)
    model = wrap_for_training(build_model(config, args), config, ddp_config(args))
    optimizer = build_optimizer(optimizer_config(args), model)
    scheduler = build_scheduler(optimizer, args)
    print_rank_0(f" model: {count_parameters(model):,} parameters on this rank; device {platform.activate()}")

    index = open_round(args, tokenizer)
    progress, loaded_from = load_progress(args, model, optimizer, scheduler)
    claim_save_folder(args, progress, loaded_from)
    enter_round(progress, loaded_from, index, args)
    datasets = build_round_datasets(args, tokenizer, progress, index)
    recorder, datasets = online_recorder(args, tokenizer, datasets)
    token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=platform.current_device())
    return Trainer(args, model, optimizer, scheduler, datasets, token_bytes, progress, recorder)


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


def load_progress(args: Namespace, model: list, optimizer, scheduler) -> tuple[Progress, str | None]:
    """Load the newest checkpoint if there is one; how far the run then is, and the folder that says so.

    ``--pretrained-checkpoint`` gives weights to a run that has no checkpoint of its own yet, and all
    it holds to a round that continues (``--round-schedule continue``).
    """
    loaded = None
    if args.load is not None:
        loaded = load_checkpoint(args.load, model=model, optimizer=optimizer, scheduler=scheduler, args=args)
    if loaded is not None:
        return (Progress(), None) if args.finetune else (_progress_of(loaded), args.load)
    if args.load is not None and args.exit_on_missing_checkpoint:
        raise FileNotFoundError(f"--load {args.load}: no checkpoint found (--exit-on-missing-checkpoint)")
    if args.pretrained_checkpoint is not None:
        loaded = _load_pretrained(args, model, optimizer, scheduler)
        if _round_continues(args):
            return _progress_of(loaded), args.pretrained_checkpoint
    elif args.load is not None:
        print_rank_0(f" no checkpoint in {args.load}: starting from the initial weights")
    return Progress(), None


def _progress_of(loaded) -> Progress:
    known = {name: loaded.run_state[name] for name in vars(Progress()) if name in loaded.run_state}
    return Progress(**known | {"iteration": loaded.iteration, "checkpoints": loaded.checkpoints})


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


def _round_continues(args: Namespace) -> bool:
    return args.round_index is not None and args.round_schedule == "continue"


def _load_pretrained(args: Namespace, model: list, optimizer, scheduler):
    """The weights of ``--pretrained-checkpoint``, or everything in it for a round that continues."""
    folder, parts = args.pretrained_checkpoint, {"args": Namespace(**vars(args) | {"finetune": True})}
    if _round_continues(args):
        parts = {"args": args, "scheduler": scheduler}
    loaded = load_checkpoint(folder, model=model, optimizer=optimizer, **parts)
    if loaded is None:
        raise FileNotFoundError(f"--pretrained-checkpoint {folder}: no checkpoint found")
    return loaded


def count_parameters(model: list) -> int:
    """Number of parameters this rank holds."""
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())

"""From arguments to a trainer that stands where the run stopped last."""

from argparse import Namespace

import torch

from megatron_ext import platform
from megatron_ext.arguments.configs import ddp_config, optimizer_config, padded_vocab_size, transformer_config
from megatron_ext.data import build_datasets
from megatron_ext.data.agree import on_every_rank
from megatron_ext.models.builder import build_model, wrap_for_training
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.training.checkpointing import load_checkpoint
from megatron_ext.training.data import dataset_sizes
from megatron_ext.training.distributed import print_rank_0
from megatron_ext.training.loop import Progress, Trainer
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.schedule import build_scheduler


def build_trainer(args: Namespace) -> Trainer:
    """Tokenizer, model, optimizer, checkpoint and data, in this order; a collective call."""
    tokenizer = on_every_rank(lambda: build_tokenizer(args))
    args.padded_vocab_size = padded_vocab_size(tokenizer.vocab_size, args)
    args.tokenizer_sha256 = tokenizer.sha256

    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    config = transformer_config(args)
    model = wrap_for_training(build_model(config, args), config, ddp_config(args))
    optimizer = build_optimizer(optimizer_config(args), model)
    scheduler = build_scheduler(optimizer, args)
    print_rank_0(f" model: {count_parameters(model):,} parameters on this rank; device {platform.activate()}")

    progress = load_progress(args, model, optimizer, scheduler)
    datasets = build_datasets(args, tokenizer, dataset_sizes(args))
    token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=platform.current_device())
    return Trainer(args, model, optimizer, scheduler, datasets, token_bytes, progress)


def load_progress(args: Namespace, model: list, optimizer, scheduler) -> Progress:
    """Load the newest checkpoint if there is one; how far the run then is.

    ``--pretrained-checkpoint`` gives weights to a run that has no checkpoint of its own yet.
    """
    loaded = None
    if args.load is not None:
        loaded = load_checkpoint(args.load, model=model, optimizer=optimizer, scheduler=scheduler, args=args)
    if loaded is not None:
        if args.finetune:
            return Progress()
        known = {name: loaded.run_state[name] for name in vars(Progress()) if name in loaded.run_state}
        return Progress(**known | {"iteration": loaded.iteration})
    if args.load is not None and args.exit_on_missing_checkpoint:
        raise FileNotFoundError(f"--load {args.load}: no checkpoint found (--exit-on-missing-checkpoint)")
    if args.pretrained_checkpoint is not None:
        weights = Namespace(**vars(args) | {"finetune": True})
        if (
            load_checkpoint(args.pretrained_checkpoint, model=model, optimizer=optimizer, args=weights)
            is None
        ):
            raise FileNotFoundError(
                f"--pretrained-checkpoint {args.pretrained_checkpoint}: no checkpoint found"
            )
    elif args.load is not None:
        print_rank_0(f" no checkpoint in {args.load}: starting from the initial weights")
    return Progress()


def count_parameters(model: list) -> int:
    """Number of parameters this rank holds."""
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())

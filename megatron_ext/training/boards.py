"""TensorBoard and Weights & Biases under Megatron-LM's tags."""

from argparse import Namespace
from collections.abc import Callable


class Boards:
    """Writes scalars to whichever boards the flags name; none costs nothing."""

    def __init__(self, args: Namespace):
        self.writers: list[Callable[[str, float, int], None]] = []
        self.closers: list[Callable[[], None]] = []
        if args.tensorboard_dir:
            self._add_tensorboard(args)
        if args.wandb_project:
            self._add_wandb(args)

    def _add_tensorboard(self, args: Namespace) -> None:
        # Imported here: it costs a second, and most short runs do without.
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.tensorboard_dir, max_queue=args.tensorboard_queue_size)
        self.writers.append(writer.add_scalar)
        self.closers.append(writer.close)
        writer.add_text("arguments", "\n".join(f"    {name} {value}" for name, value in vars(args).items()))

    def _add_wandb(self, args: Namespace) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb-project needs Weights & Biases: pip install wandb") from None
        run = wandb.init(
            project=args.wandb_project,
            name=args.wandb_exp_name,
            entity=args.wandb_entity,
            dir=args.wandb_save_dir or args.save,
            config={name: str(value) for name, value in vars(args).items()},
        )
        self.writers.append(lambda tag, value, iteration: run.log({tag: value}, step=iteration))
        self.closers.append(run.finish)

    def scalar(self, tag: str, value: float, iteration: int, samples: int) -> None:
        """One point against iterations, and one against samples."""
        for write in self.writers:
            write(tag, value, iteration)
            write(f"{tag} vs samples", value, samples)

    def add_scalar(self, tag: str, value: float, iteration: int) -> None:
        """One point against iterations, as Megatron-Core's timers write them."""
        for write in self.writers:
            write(tag, value, iteration)

    def close(self) -> None:
        """Write what is queued and close."""
        for close in self.closers:
            close()

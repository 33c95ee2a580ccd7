"""A tiny PanGu-pi model, trained on made-up tokens, for the tests of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.distributed import finalize_model_grads

from megatron_ext.arguments import parse_args
from megatron_ext.config import RunConfig
from megatron_ext.kernels.documents import document_starts
from megatron_ext.models.builder import build_model, ddp_config, wrap_for_training
from megatron_ext.models.config import transformer_config
from megatron_ext.training.callbacks import Callback, Callbacks
from megatron_ext.training.optimizer import build_optimizer, optimizer_config
from megatron_ext.training.schedule import build_scheduler
from megatron_ext.training.step import train_step
from tests.helpers.parallel import Layout

#: Losses of one process and of another layout agree to this (measured: 1.1e-5).
RELATIVE = 2e-5
SEQUENCE, VOCABULARY, GLOBAL_BATCH = 16, 64, 4
FLAGS = f"""
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --micro-batch-size 1 --global-batch-size {GLOBAL_BATCH} --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine
    --lr-warmup-iters 2 --train-iters 20 --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95
    --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --mock-data --make-vocab-size-divisible-by 16
    --eval-iters 0
"""

PI_MODULES = """
    --series-activation-order 2 --augmented-shortcuts 1 --augmented-shortcut-reduction 4 --pangu-init random
"""


def arguments(layout: Layout, *more: str, pi: str = PI_MODULES, device: str | None = None) -> RunConfig:
    """The configuration of a tiny run at ``layout``; ``pi`` are the flags of the PanGu-pi modules.

    ``device`` assumes a machine, as for a command line that is checked for another one.
    """
    flags = [
        *FLAGS.split(),
        *pi.split(),
        *("--tensor-model-parallel-size", str(layout.tp)),
        *("--pipeline-model-parallel-size", str(layout.pp)),
    ]
    if layout.vpp:
        flags += ["--num-layers-per-virtual-pipeline-stage", str(4 // layout.pp // layout.vpp)]
    run = parse_args([*flags, *more], world_size=layout.world_size, device=device)
    return run.but(padded_vocab_size=VOCABULARY + 16, tokenizer_sha256="0" * 64)


class Before(Callback):
    """Calls ``action`` before each update."""

    def __init__(self, action: Callable[[], None]):
        self.before_update = action


@dataclass
class Run:
    """Model, optimizer and scheduler of a tiny run, and what it did so far."""

    config: RunConfig
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        run = self.config
        num_microbatches_calculator.unset_num_microbatches_calculator()
        num_microbatches_calculator.init_num_microbatches_calculator(
            0,
            None,
            run.training.global_batch_size,
            run.training.micro_batch_size,
            run.parallel.data_parallel_size,
        )
        config = transformer_config(run)
        self.model = wrap_for_training(build_model(config, run), config, ddp_config(run))
        self.optimizer = build_optimizer(optimizer_config(run), self.model)
        self.scheduler = build_scheduler(self.optimizer, run.schedule, run.optimizer)
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.model:
            chunk.train()

    @property
    def parts(self) -> dict:
        """The arguments of saving and loading."""
        return dict(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, run=self.config)

    @property
    def run_state(self) -> dict:
        return {"consumed_train_samples": self.iteration * GLOBAL_BATCH, "round": 2}

    def train(self, steps: int, before_update: Callable[[], None] = lambda: None) -> "Run":
        """Train ``steps`` iterations on tokens that depend only on iteration and sample."""
        for _ in range(steps):
            iterators = [iter(self._microbatches()) for _ in self.model]
            parts = self.model, self.optimizer, self.scheduler
            result = train_step(iterators, *parts, self.config, Callbacks([Before(before_update)]))
            self.iteration += 1
            last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
            loss = torch.tensor([result.lm_loss], dtype=torch.float64)
            if parallel_state.get_pipeline_model_parallel_world_size() > 1:
                torch.distributed.broadcast(
                    loss, last_stage, group=parallel_state.get_pipeline_model_parallel_group()
                )
            self.losses.append(loss.item())
            self.norms.append(result.grad_norm)
        return self

    def _microbatches(self):
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        size = self.config.training.micro_batch_size
        for first in range(rank * size, GLOBAL_BATCH, ranks * size):
            tokens = torch.stack([self._sample(first + i) for i in range(size)])
            microbatch = {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "loss_mask": torch.ones(size, SEQUENCE),
                "position_ids": torch.arange(SEQUENCE).expand(size, SEQUENCE),
            }
            if self.config.data.reset_attention_mask:  # a quarter of the tokens end documents
                microbatch["document_starts"] = document_starts(tokens[:, :-1] < VOCABULARY // 8)
            yield microbatch

    def _sample(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.iteration + number)
        return torch.randint(VOCABULARY // 2, (SEQUENCE + 1,), generator=generator)

    def bits(self) -> list[bytes]:
        """Parameters and optimizer state of this rank, bit for bit."""
        tensors = [p.detach() for chunk in self.model for p in chunk.parameters()]
        for optimizer in self.optimizer.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                for p in group["params"]:
                    tensors += [p.detach(), *optimizer.optimizer.state[p].values()]
        return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]

"""One contender of benchmarks/train_step.py in processes of its own: builds a model, takes steps when told.

Reads commands from standard input, one a line ("step N", "end"), and answers each with a line of JSON.
Everything that libraries print goes to standard error.
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta

SHAPES = {
    "tiny": "--model-preset tiny",
    "small": "--model-preset small",
    "wide": "--model-preset 1.5b-pro --num-layers 1 --seq-length 1024",
}
VOCABULARY = {"tiny": 4096, "small": 8192, "wide": 8192}
PI_OFF = "--series-activation-order 0 --augmented-shortcuts 0"
NO_FUSION = "--no-gradient-accumulation-fusion"
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

Step = Callable[[], float]


def make_parser() -> argparse.ArgumentParser:
    """What the parent says to a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=list(CONTENDERS), required=True)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--micro-batches", type=int, required=True)
    parser.add_argument("--meeting-file", required=True, help="where the ranks of a contender meet")
    return parser


def samples(case: argparse.Namespace, sequence: int, rank: int = 0):
    """Microbatches of random tokens without end, [micro batch, sequence + 1]."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    shape = (case.micro_batch_size, sequence + 1)
    while True:
        yield torch.randint(VOCABULARY[case.shape], shape, generator=generator)


def join(case: argparse.Namespace) -> None:
    """The process group of this contender's ranks."""
    import torch.distributed as dist

    store = dist.FileStore(case.meeting_file, case.world)
    dist.init_process_group(
        "gloo", store=store, rank=case.rank, world_size=case.world, timeout=timedelta(minutes=10)
    )


# ------------------------------------------------------------------- Megatron-Core: ours, and stock


def megatron_arguments(case: argparse.Namespace, extra: str) -> argparse.Namespace:
    """The trainer's own arguments for this case."""
    from megatron_ext.arguments.parser import read_args

    batch = case.micro_batch_size * case.micro_batches
    flags = (
        f"{SHAPES[case.shape]} {extra} --mock-data --tokenizer-type NullTokenizer "
        f"--vocab-size {VOCABULARY[case.shape] - 1} --padded-vocab-size {VOCABULARY[case.shape]} "
        f"--tensor-model-parallel-size {case.world} --micro-batch-size {case.micro_batch_size} "
        f"--global-batch-size {batch} --train-iters 1000 --lr {LEARNING_RATE} --lr-decay-style constant "
        f"--adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --adam-eps {EPSILON} "
        f"--weight-decay {WEIGHT_DECAY} --clip-grad {CLIP}"
    )
    if case.precision == "bf16":
        flags += " --bf16"
    os.environ |= {"RANK": str(case.rank), "WORLD_SIZE": str(case.world), "LOCAL_RANK": str(case.rank)}
    run = read_args(flags.split(), world_size=case.world, device="cpu")
    run = run.but(padded_vocab_size=VOCABULARY[case.shape])
    return run


def stock_model(config, run) -> list:
    """Megatron-Core's GPTModel with its local layers and its own rotary embedding."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_ext.models.initialization import initialize, mark_split_parameters

    for name, upstream in rope_utils.__loader__.replaced.items():
        setattr(rope_utils, name, upstream)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=run.model.normalization),
        vocab_size=run.model.padded_vocab_size,
        max_sequence_length=run.model.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
    )
    mark_split_parameters(model)
    initialize(model, config, run.init.seed)
    return [model]


def megatron(case: argparse.Namespace, extra: str, stock: bool = False) -> tuple[Step, dict]:
    """A step of the trainer over our model, or over the stock one."""
    from megatron.core.optimizer import get_megatron_optimizer

    from megatron_ext import platform
    from megatron_ext.models.builder import build_model, ddp_config, wrap_for_training
    from megatron_ext.models.config import transformer_config
    from megatron_ext.training import distributed
    from megatron_ext.training.loop import connect
    from megatron_ext.training.optimizer import build_optimizer, optimizer_config
    from megatron_ext.training.schedule import build_scheduler
    from megatron_ext.training.step import train_step

    run = megatron_arguments(case, extra)
    before = memory_now()
    if stock:  # what this project adds to the trainer for speed is not stock
        platform.keep_freed_memory = lambda: None
    distributed.initialize(run)
    config = transformer_config(run)
    chunks = stock_model(config, run) if stock else build_model(config, run)
    model = wrap_for_training(chunks, config, ddp_config(run))
    # Without Transformer Engine and Apex, Megatron-Core takes torch's AdamW.
    build = get_megatron_optimizer if stock else build_optimizer
    optimizer = build(optimizer_config(run), model)
    scheduler = build_scheduler(optimizer, run.schedule, run.optimizer)
    connect(model, optimizer, run)
    model[0].train()
    iterator = (as_sample(ids) for ids in samples(case, run.data.seq_length))
    count = sum(p.numel() for p in model[0].parameters())
    info = {
        "before": before,
        "parameters": count,
        "flops_per_token": run.model.flops_per_token(run.data.seq_length),
    }
    return lambda: train_step([iterator], model, optimizer, scheduler, run).lm_loss, info


def as_sample(ids) -> dict:
    """A microbatch as the data loader gives it to the trainer."""
    import torch

    tokens = ids[:, :-1].contiguous()
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    labels = ids[:, 1:].contiguous()
    mask = torch.ones(tokens.shape)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}


# ------------------------------------------------------------------------------------- transformers


def llama(case: argparse.Namespace) -> tuple[Step, dict]:
    """transformers' Llama, SDPA, torch's fused AdamW; data parallel over several processes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    run = megatron_arguments(case, PI_OFF)
    before = memory_now()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=run.model.padded_vocab_size,
        hidden_size=run.model.hidden_size,
        intermediate_size=run.model.ffn_hidden_size,
        num_hidden_layers=run.model.num_layers,
        num_attention_heads=run.model.num_attention_heads,
        max_position_embeddings=run.model.max_position_embeddings,
        rms_norm_eps=run.model.layernorm_epsilon,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    count = sum(p.numel() for p in model.parameters())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if case.world > 1 else model
    batches = samples(case, run.data.seq_length, case.rank)

    def step() -> float:
        total = 0.0
        for _ in range(case.micro_batches):
            ids = next(batches)[:, : run.data.seq_length][case.rank :: case.world]
            with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
                loss = wrapped(input_ids=ids, labels=ids).loss / case.micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step, {
        "before": before,
        "parameters": count,
        "flops_per_token": run.model.flops_per_token(run.data.seq_length),
    }


CONTENDERS: dict[str, Callable] = {
    "ours, pi on": lambda case: megatron(case, ""),
    "ours, pi off": lambda case: megatron(case, PI_OFF),
    "stock GPTModel": lambda case: megatron(case, f"{PI_OFF} {NO_FUSION}", stock=True),
    "transformers Llama": llama,
}


def memory_now() -> dict[str, int]:
    """Bytes that this process has from the system, and those of them in use."""
    import psutil

    return {"resident": psutil.Process().memory_info().rss, "allocated": allocated_bytes()}


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated_bytes() -> int:
    """Memory that the C library has handed out; 0 where it cannot tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def peak_allocated(step: Step) -> int:
    """The most that was handed out during a step, looked at every millisecond."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen[0] = max(seen[0], allocated_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return seen[0]


def main() -> None:
    """Build, say what was built, and take steps until told to end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = make_parser().parse_args()
    import torch

    torch.set_num_threads(case.threads)
    from megatron_ext import platform

    platform.activate("cpu")
    join(case)
    step, info = CONTENDERS[case.contender](case)
    print(json.dumps(info), file=answers)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "end":
            break
        start, cpu = time.perf_counter(), time.process_time()
        losses = [step() for _ in range(int(numbers[0]))]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        answer = {"seconds": seconds, "cpu": cpu, "loss": losses[-1]}
        print(json.dumps(answer), file=answers)
    peaks = {"resident": platform.max_memory_bytes(), "allocated": peak_allocated(step)}
    print(json.dumps({kind: peak - info["before"][kind] for kind, peak in peaks.items()}), file=answers)


if __name__ == "__main__":
    main()

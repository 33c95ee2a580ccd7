"""Saving checkpoints: small and many ranks, large beside torch.save and dd, and in the background.

    python benchmarks/checkpoint.py --folder runs/benchmark
    python benchmarks/checkpoint.py --folder /scratch --gigabytes 18 --part stream

small   4 gloo processes save a 12 MB training state (upstream 0.16.1: 27 s on 2 cores)
stream  parameters and Adam's moments in the shapes of the 1.5B preset, as many layers as --gigabytes
        hold, written as a checkpoint, by torch.save (then fsync) and by dd (conv=fsync), in turns
async   what a save adds to the time of a training loop, and how long the loop stands still, with
        --async-save beside the same save without it, on --threads threads

Times end when the bytes are on the disk. Medians of --repeats; the files are removed afterwards.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from functools import partial

from megatron_ext import platform
from megatron_ext.config import RunConfig
from megatron_ext.config.presets import preset

PARTS = ("small", "stream", "async")


def measured(action) -> float:
    """Seconds that ``action()`` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def join(rank: int, world: int, meeting: str) -> None:
    """Megatron-Core's groups over ``world`` gloo processes that meet at a file."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    store = torch.distributed.HashStore() if world == 1 else torch.distributed.FileStore(meeting, world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def state_of(gigabytes: float, layers: int | None = None, **sizes: int) -> dict:
    """Sharded tensors of some layers in the 1.5B preset's shapes: fp32 weights and Adam's two moments."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    size = preset("1.5b-pro")
    h, f = sizes.get("hidden", size.hidden_size), sizes.get("ffn", size.ffn_hidden_size)
    shapes = {"linear_qkv": (3 * h, h), "linear_proj": (h, h), "linear_fc1": (2 * f, h), "linear_fc2": (h, f)}
    per_layer = 12 * sum(a * b for a, b in shapes.values())
    count = layers or max(1, round(gigabytes * 1e9 / per_layer))
    state = {}
    for layer in range(count):
        for kind in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
            for name, shape in shapes.items():
                key = f"{kind}decoder.layers.{layer}.{name}.weight"
                tensor = torch.empty(shape).fill_(0.5 + layer)
                replica = torch.distributed.get_rank()
                state[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=replica)
    return state


def write_state(state: dict, folder: Path) -> None:
    """What save_checkpoint does with a training state."""
    from megatron_ext.checkpoint import folders, save, writer

    pending = save.PendingSave(folder, 1, folders.working_dir(folder, 1), save.Retain())
    pending.prepare(None)
    save._divide_among_replicas(state, RunConfig.of({}))
    pending.start(writer.plan(state), b"")
    pending.finish()


def small(folder: Path, repeats: int) -> dict:
    """12 MB over 4 processes, forked from this one."""
    from megatron_ext.checkpoint import save  # noqa: F401 (imported before the fork)

    world, results = 4, folder / "small.json"
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            join(rank, world, str(folder / "store"))
            save_once = partial(write_state, state_of(0, layers=4, hidden=128, ffn=384), folder / "small")
            times = [measured(save_once) for _ in range(repeats)]
            if rank == 0:
                results.write_text(json.dumps(times))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    size = sum(path.stat().st_size for path in (folder / "small").rglob("*.distcp"))
    return {"megabytes": size / 1e6, "seconds": statistics.median(json.loads(results.read_text()))}


def stream(folder: Path, gigabytes: float, repeats: int) -> dict:
    """Ours, torch.save and dd in turns; bytes a second of each."""
    import torch

    state = state_of(gigabytes)
    tensors = {key: value.data for key, value in state.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())

    def by_torch() -> None:
        with open(folder / "torch.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def by_dd() -> None:
        blocks = f"count={max(1, size >> 24)}"
        command = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=16M", blocks, "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)

    contenders = {
        "ours": lambda: write_state(state, folder / "stream"),
        "torch.save": by_torch,
        "dd": by_dd,
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        order = list(contenders)
        for name in order[turn % 3 :] + order[: turn % 3]:
            speeds[name].append(size / measured(contenders[name]))
            for path in (folder / "torch.pt", folder / "dd"):
                path.unlink(missing_ok=True)
            shutil.rmtree(folder / "stream", ignore_errors=True)
            os.sync()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    others = max(medians["torch.save"], medians["dd"])
    return {"gigabytes": size / 1e9, "megabytes_per_second": {n: v / 1e6 for n, v in medians.items()}} | {
        "ratio": medians["ours"] / others
    }


def training(folder: Path, gigabytes: float, threads: int):
    """A run of the real program, set up: the trainer, its iterators, and a Saver into ``folder``."""
    import torch

    from megatron_ext.arguments import parse_args
    from megatron_ext.training import distributed
    from megatron_ext.training.data import chunk_iterators
    from megatron_ext.training.loop import connect
    from megatron_ext.training.saving import Saver
    from megatron_ext.training.setup import build_trainer

    torch.set_num_threads(threads)
    hidden, ffn = 1024, 2816
    layers = max(1, round(gigabytes * 1e9 / (12 * (4 * hidden**2 + 3 * hidden * ffn))))
    argv = f"""
        --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads 16
        --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm
        --swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --lr 1e-4
        --micro-batch-size 1 --global-batch-size 1 --train-iters 1000
        --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --eval-iters 0 --num-workers 0
        --save {folder / "run"} --save-interval 1000 --keep-latest-k 1
    """
    run = parse_args(argv.split())
    distributed.initialize(run)
    trainer = build_trainer(run)
    connect(trainer.model, trainer.optimizer, run)
    saver = Saver(run, trainer.model, trainer.optimizer, trainer.scheduler, 0)
    return trainer, chunk_iterators(trainer.datasets[0], run, 0), saver


def background(folder: Path, gigabytes: float, repeats: int, threads: int) -> dict:
    """What a save costs a training loop, in the way and in the background.

    Five iterations are run without a save, after a save in the way, and after one in the background, in
    turns. ``added``: seconds that they take longer than without; ``stood``: seconds of these in which the
    loop stood still, rather than having to share processor and memory.
    """
    from megatron_ext.training.step import train_step

    trainer, iterators, saver = training(folder, gigabytes, threads)
    from megatron_ext.training.callbacks import Callback, Callbacks

    parts = trainer.model, trainer.optimizer, trainer.scheduler
    took: dict[str, list[float]] = {"none": [], "sync": [], "async": []}
    stood: dict[str, list[float]] = {"none": [], "sync": [], "async": []}

    def stretch(kind: str) -> None:
        still = []

        def standing(action, *args) -> None:
            still.append(measured(lambda: action(*args)))

        class Standing(Callback):
            def before_update(self) -> None:
                standing(saver.before_update)

        start = time.perf_counter()
        if kind != "none":
            saver.run.checkpoint.async_save = kind == "async"
            trainer.progress.iteration += 1
            standing(saver.save, trainer.progress)
        for _ in range(5):
            train_step(iterators, *parts, saver.run, Callbacks([Standing()]))
            standing(saver.poll)
        standing(saver.finish)
        took[kind].append(time.perf_counter() - start)
        stood[kind].append(sum(still))
        os.sync()

    for turn in range(repeats + 1):  # the first of each kind gets the memory
        for kind in list(took)[turn % 3 :] + list(took)[: turn % 3]:
            stretch(kind)
    found: dict = {"threads": threads, "gigabytes": _state_bytes(folder / "run") / 1e9}
    seconds = {kind: statistics.median(values[1:]) for kind, values in took.items()}
    found["seconds_per_iteration"] = seconds["none"] / 5
    for kind in ("sync", "async"):
        found[f"{kind}_added"] = seconds[kind] - seconds["none"]
        found[f"{kind}_stood"] = statistics.median(stood[kind][1:])
    for what in ("added", "stood"):
        found[f"ratio_{what}"] = found[f"async_{what}"] / found[f"sync_{what}"]
    return found


def _state_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.distcp"))


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", required=True, metavar="PATH", help="on the disk to measure")
    p.add_argument("--part", choices=PARTS, action="append", help="one or more; all by default")
    p.add_argument("--gigabytes", type=float, default=2.0, metavar="X", help="of stream; in memory, too")
    p.add_argument("--repeats", type=int, default=3, metavar="N")
    p.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="that train, of async")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    parts = args.part or PARTS
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    if free < 3 * args.gigabytes * 1e9:
        p.error(f"--folder {args.folder}: {free / 1e9:.1f} GB free, {3 * args.gigabytes:.1f} are needed")
    platform.activate()
    from megatron_ext.training import distributed

    found: dict = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if "small" in parts:
            found["small"] = small(folder, args.repeats + 2)
        if "async" in parts:
            found["async"] = background(folder, min(args.gigabytes, 0.7), args.repeats, args.threads)
            distributed.finalize()
        if "stream" in parts:
            join(0, 1, "")
            found["stream"] = stream(folder, args.gigabytes, args.repeats)
    print(json.dumps(found) if args.json else json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Saving checkpoints: small and many ranks, large beside torch.save and dd, and in the background.

    python benchmarks/checkpoint.py --folder runs/benchmark
    python benchmarks/checkpoint.py --folder /scratch --gigabytes 18 --part stream

small   4 gloo processes save a 12 MB training state (upstream 0.16.1: 27 s on 2 cores)
stream  parameters and Adam's moments in the shapes of the 1.5B preset, as many layers as --gigabytes
        hold, written as a checkpoint, by torch.save (then fsync) and by dd (conv=fsync), in turns
async   how long --async-save keeps the training loop waiting, beside the same save without it

Times end when the bytes are on the disk. Medians of --repeats; the files are removed afterwards.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide Python's own

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
from megatron_ext.models.presets import preset

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
    h, f = sizes.get("hidden", size.hidden), sizes.get("ffn", size.ffn)
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


def write_state(state: dict, folder: Path, in_background: bool = False, buffers: dict | None = None):
    """What save_checkpoint does with a training state, around it; the PendingSave."""
    from megatron_ext.training.checkpointing import folders, save, writer

    previous = save.on_rank_0("prepare", lambda: save._prepare(folder, 1))
    pending = save.PendingSave(folder, 1, folders.working_dir(folder, 1), save.Retain(), previous)
    args = argparse.Namespace(ckpt_fully_parallel_save=True)
    save._divide_among_replicas(state, args)
    plan = writer.plan(state)
    pending.start(writer.snapshot(plan, buffers) if in_background else plan, b"", in_background)
    if not in_background:
        pending.finish()
    return pending


def small(folder: Path, repeats: int) -> dict:
    """12 MB over 4 processes, forked from this one."""
    from megatron_ext.training.checkpointing import save  # noqa: F401 (imported before the fork)

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


def background(folder: Path, gigabytes: float, repeats: int) -> dict:
    """Seconds that the caller waits, with and without a background save."""
    state, blocked, whole, buffers = state_of(gigabytes), [], [], {}
    for _ in range(repeats):
        whole.append(measured(lambda: write_state(state, folder / "sync")))
        start = time.perf_counter()
        pending = write_state(state, folder / "async", in_background=True, buffers=buffers)
        blocked.append(time.perf_counter() - start)
        ready = False
        while not ready:  # as the training loop asks once an iteration
            time.sleep(0.1)
            start = time.perf_counter()
            ready = pending.ready()
            blocked[-1] += time.perf_counter() - start
        blocked[-1] += measured(pending.finish)
        for name in ("sync", "async"):
            shutil.rmtree(folder / name)
    sync, wait = statistics.median(whole), statistics.median(blocked)
    return {"gigabytes": gigabytes, "sync_seconds": sync, "blocked_seconds": wait, "ratio": wait / sync}


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", required=True, metavar="PATH", help="on the disk to measure")
    p.add_argument("--part", choices=PARTS, action="append", help="one or more; all by default")
    p.add_argument("--gigabytes", type=float, default=2.0, metavar="X", help="of stream; in memory, too")
    p.add_argument("--repeats", type=int, default=3, metavar="N")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    parts = args.part or PARTS
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    if free < 3 * args.gigabytes * 1e9:
        p.error(f"--folder {args.folder}: {free / 1e9:.1f} GB free, {3 * args.gigabytes:.1f} are needed")
    platform.activate()
    found: dict = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if "small" in parts:
            found["small"] = small(folder, args.repeats + 2)
        if set(parts) & {"stream", "async"}:
            join(0, 1, "")
        if "stream" in parts:
            found["stream"] = stream(folder, args.gigabytes, args.repeats)
        if "async" in parts:
            found["async"] = background(folder, min(args.gigabytes, 1.0), args.repeats)
    print(json.dumps(found) if args.json else json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

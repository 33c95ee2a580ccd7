#!/usr/bin/env python
"""Whether a second round on half of the data helps: five ways to go on after one epoch, several seeds.

For every seed a small model is trained for one epoch and its losses are recorded; then the same second round
(schedule restarted, Adam's state new) is trained on: nothing; all samples again; a uniformly drawn half; the
half that softmax draws by batch, as the paper does; the half that it draws by sample. Measured: bits per
byte of validation text, and the loss on the first tenth of round 1's samples ("early data").

    python benchmarks/rounds.py --corpus train_en.jsonl.gz train_zh.jsonl.gz train_code.jsonl.gz \\
        --valid valid_en.jsonl.gz valid_zh.jsonl.gz valid_code.jsonl.gz --output runs/rounds

Finished parts are kept in the output folder and not done again; SIGTERM stops, the same command goes on.
A second command times the sampler alone:

    python benchmarks/rounds.py --sampler 100_000_000 --output runs/sampler
"""

from __future__ import annotations

import os
import sys

# The project's root, so that a checkout works without being installed.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gzip
import json
import resource
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks.study import spread
from megatron_ext.data.rounds.loss_record import read_losses

EARLY = 0.1
#: Name -> (rate, group by batch, temperature) of the second round's index; None trains no second round.
ARMS = {
    "no second round": None,
    "full second epoch": (1.0, False, 1.0),
    "uniform half": (0.5, False, 1e9),
    "softmax half, by batch": (0.5, True, 1.0),
    "softmax half, by sample": (0.5, False, 1.0),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--corpus", nargs="+", default=[], metavar="FILE", help="JSON lines, gzip-compressed or not"
    )
    p.add_argument("--valid", nargs="+", default=[], metavar="FILE", help="held-out text of the same kind")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    p.add_argument(
        "--every", type=int, default=12, metavar="N", help="take every N-th document (default: 12)"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    p.add_argument("--hidden", type=int, default=96, metavar="N", help="hidden size (default: 96)")
    p.add_argument("--layers", type=int, default=3, metavar="N", help="layers (default: 3)")
    p.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="pieces (default: 4096)")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="samples of a batch (default: 8)")
    p.add_argument("--sampler", type=int, metavar="N", help="only time the drawing of half of N groups")
    return p


def prepare(args: argparse.Namespace) -> dict[str, Path]:
    """Tokenizer and datasets of every N-th document; what is there already is kept."""
    paths = {"model": args.output / "tokenizer.model"}
    for name, sources in (("train", args.corpus), ("valid", args.valid)):
        text = args.output / f"{name}.jsonl"
        paths[name] = args.output / f"{name}_text_document"
        if not text.exists():
            step = args.every if name == "train" else max(1, args.every // 4)
            text.write_text("".join(every(sources, step)), encoding="utf-8")
    tools = Path(sys.path[0], "tools")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", paths["model"]]
    if not paths["model"].exists():
        run(
            *(tools / "train_tokenizer.py", "--input", args.output / "train.jsonl", "--sample-mb", 4),
            *("--vocab-size", args.vocab_size, "--output", paths["model"]),
        )
    for name in ("train", "valid"):
        run(
            *(tools / "preprocess_data.py", "--input", args.output / f"{name}.jsonl", "--append-eod"),
            *("--output-prefix", args.output / name, *tokenizer, "--workers", 1),
        )
    return paths


def every(sources: list[str], step: int):
    """Every ``step``-th line of each file."""
    for source in sources:
        opener = gzip.open if source.endswith(".gz") else open
        with opener(source, "rt", encoding="utf-8") as lines:
            yield from (line for number, line in enumerate(lines) if number % step == 0)


def run(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


class Experiment:
    """The runs of one seed."""

    def __init__(self, args: argparse.Namespace, paths: dict[str, Path], seed: int):
        from megatron_ext.data.indexed import read_index

        self.args, self.seed, self.folder = args, seed, args.output / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seq_length = 256
        per_epoch = (read_index(paths["train"]).num_tokens - 1) // self.seq_length
        self.samples = per_epoch // args.batch * args.batch
        self.flags = {
            "num-layers": args.layers, "hidden-size": args.hidden, "num-attention-heads": args.hidden // 32,
            "ffn-hidden-size": args.hidden * 11 // 4, "seq-length": self.seq_length,
            "max-position-embeddings": self.seq_length, "position-embedding-type": "rope",
            "normalization": "RMSNorm", "swiglu": True, "disable-bias-linear": True, "attention-dropout": 0,
            "hidden-dropout": 0, "series-activation-order": 2, "augmented-shortcuts": 1,
            "augmented-shortcut-reduction": 16, "tokenizer-type": "SentencePieceTokenizer",
            "tokenizer-model": paths["model"], "train-data-path": paths["train"],
            "valid-data-path": paths["valid"], "data-cache-path": args.output / "cache", "seed": seed,
            "micro-batch-size": args.batch, "global-batch-size": args.batch, "lr": 3e-3, "min-lr": 3e-4,
            "lr-decay-style": "cosine", "lr-warmup-fraction": 0.03, "weight-decay": 0.1, "adam-beta2": 0.95,
            "num-workers": 0, "full-validation": True, "eval-iters": 1, "log-interval": 100,
        }  # fmt: skip

    def pretrain(self, **changes) -> None:
        """One run of pretrain_pangu_pro.py in this process."""
        import pretrain_pangu_pro

        values = self.flags | {name.replace("_", "-"): value for name, value in changes.items()}
        argv = [
            [f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items()
        ]
        pretrain_pangu_pro.main(sum(argv, []))

    def train(self, name: str, samples: int, **more) -> dict:
        """Train, unless it was done before; validation bits per byte and tokens taken."""
        folder = self.folder / name.replace(" ", "-").replace(",", "")
        metrics, tracker = folder / "metrics.jsonl", folder / "latest_checkpointed_iteration.txt"
        iterations = str(samples // self.args.batch)
        if not tracker.exists() or tracker.read_text().strip() != iterations:
            started = time.process_time()
            self.pretrain(train_iters=iterations, save=folder, load=folder, save_interval=10**6,
                          metrics_file=metrics, **more)  # fmt: skip
            print(f"seed {self.seed}, {name}: {time.process_time() - started:.0f} s of CPU", flush=True)
            if tracker.read_text().strip() != iterations:
                sys.exit("stopped by a signal; start again to go on")
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        valid = [record for record in records if record.get("split") == "validation"][-1]
        tokens = [record for record in records if "split" not in record][-1]["consumed_tokens"]
        return {"folder": folder, "bits_per_byte": valid["bits_per_byte"], "tokens": tokens}

    def losses(self, folder: Path, samples: int) -> np.ndarray:
        """Losses of a trained model on the first ``samples`` samples of round 1.

        Within one epoch of one dataset they do not depend on how many are drawn.
        """
        path = folder / f"losses_{samples}.npy"
        self.pretrain(train_samples=samples, load=folder, record_sample_loss=path)
        return read_losses(path).losses

    def index(self, arm: str) -> Path:
        """The second round's samples."""
        from megatron_ext.data.rounds.build_round import RoundOptions, build_round

        rate, by_batch, temperature = ARMS[arm]
        options = RoundOptions(
            rate, group_size=self.args.batch if by_batch else 1, temperature=temperature, seed=self.seed
        )
        path = self.folder / f"{arm.replace(' ', '-').replace(',', '')}.npy"
        build_round(self.folder / "round-1" / f"losses_{self.samples}.npy", options, path)
        return path

    def results(self) -> dict[str, dict]:
        """Of every arm: bits per byte, loss on early data, tokens."""
        first = self.train("round 1", self.samples)
        losses, early = self.losses(first["folder"], self.samples), int(EARLY * self.samples)
        found = {"no second round": first | {"early_loss": float(losses[:early].mean())}}
        for arm in list(ARMS)[1:]:
            index = self.index(arm)
            selected = len(np.load(index, mmap_mode="r")) // self.args.batch * self.args.batch
            second = self.train(arm, selected, round_index=index, pretrained_checkpoint=first["folder"])
            second["tokens"] += first["tokens"]
            found[arm] = second | {"early_loss": float(self.losses(second["folder"], early).mean())}
        return found


def table(by_seed: dict[int, dict[str, dict]]) -> str:
    """Means and standard deviations over the seeds, and the differences from the uniform half."""
    lines = [
        "| second round | tokens, both rounds | validation bits per byte | against uniform half "
        "| loss on early data | against uniform half |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        cells = [f"{next(iter(by_seed.values()))[arm]['tokens'] / 1e6:.2f} M"]
        for name in ("bits_per_byte", "early_loss"):
            values = [found[arm][name] for found in by_seed.values()]
            differences = [found[arm][name] - found["uniform half"][name] for found in by_seed.values()]
            cells += [spread(values), spread(differences, "+")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_sampler(groups: int, folder: Path) -> dict:
    """Draw half of ``groups`` groups from a plain file of losses; seconds and peak memory of this process."""
    from megatron_ext.data.rounds.build_round import RoundOptions, build_round

    folder.mkdir(parents=True, exist_ok=True)
    generator, path = np.random.default_rng(0), folder / "losses.npy"
    losses = np.lib.format.open_memmap(path, "w+", np.float32, (groups,))
    for begin in range(0, groups, 1 << 20):
        end = min(begin + (1 << 20), groups)
        losses[begin:end] = generator.normal(3, 0.5, end - begin)
    del losses
    started, cpu = time.perf_counter(), time.process_time()
    manifest, _ = build_round(path, RoundOptions(rate=0.5), folder / "round.npy")
    found = {
        "groups": groups, "selected": manifest["selected"], "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        # Mapped files count while they are in memory, though the kernel may drop them.
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    return found


def main() -> None:
    """Run what is asked for."""
    args = parser().parse_args()
    if args.sampler:
        print(json.dumps(time_sampler(args.sampler, args.output), indent=1))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    paths, by_seed = prepare(args), {}
    for seed in args.seeds:
        by_seed[seed] = Experiment(args, paths, seed).results()
        text = json.dumps(by_seed, indent=1, default=str)
        (args.output / "results.json").write_text(text + "\n", encoding="utf-8")
        print(f"after seed {seed}:\n{table(by_seed)}", flush=True)


if __name__ == "__main__":
    main()

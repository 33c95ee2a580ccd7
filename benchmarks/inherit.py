"""What inheritance is worth: random weights beside slices of a larger model, at equal tokens.

    python benchmarks/inherit.py --train train_en.jsonl.gz --validation valid_en.jsonl.gz --work runs/inherit

Trains a tokenizer and a source model of 10 million parameters, compresses the tokenizer, cuts a target of
half the size out of the source by each criterion, trains each target and one with random weights for the
same tokens, all with several seeds, and writes results.json, results.md and curves.png. What is there
already is not made again, so a run that was cut off goes on. docs/inheritance.md has what came.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # in place of this folder, whose tokenize.py would hide Python's own

import argparse
import json
import statistics
import subprocess

CRITERIA = ("none", "random", "l1", "l2", "taylor", "learned")
SEQUENCE, BATCH = 256, 8
COMMON = {
    "kv-channels": 32,
    "seq-length": SEQUENCE,
    "max-position-embeddings": SEQUENCE,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "series-activation-order": 2,
    "augmented-shortcuts": 1,
    "augmented-shortcut-reduction": 32,
    "tokenizer-type": "SentencePieceTokenizer",
    "micro-batch-size": BATCH,
    "lr-decay-style": "cosine",
    "weight-decay": 0.1,
    "adam-beta2": 0.95,
    "log-interval": 4,
    "num-workers": 0,
    "eval-iters": 10,
}
SWITCHES = (
    "--group-query-attention",
    "--swiglu",
    "--disable-bias-linear",
    "--untie-embeddings-and-output-weights",
)
SOURCE = {
    "num-layers": 10,
    "hidden-size": 256,
    "ffn-hidden-size": 768,
    "num-attention-heads": 8,
    "num-query-groups": 4,
}
TARGET = {
    "num-layers": 8,
    "hidden-size": 192,
    "ffn-hidden-size": 640,
    "num-attention-heads": 6,
    "num-query-groups": 3,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", required=True, metavar="FILE", help="JSON lines to train on")
    p.add_argument("--validation", required=True, metavar="FILE", help="JSON lines held out")
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="where everything goes")
    p.add_argument("--seed", type=int, action="append", metavar="N", help="run these (default 1, 2 and 3)")
    p.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA)
    p.add_argument("--depth-policy", choices=("ends", "importance", "uniform"), default="importance")
    p.add_argument("--source-iters", type=int, default=1500, help="steps of the source (default 1500)")
    p.add_argument("--iters", type=int, default=32, help="steps of each target (default 32)")
    p.add_argument("--lr", type=float, default=1e-3, help="of the targets (default 1e-3)")
    p.add_argument("--mask-steps", type=int, default=80, help="steps of learned masks (default 80)")
    p.add_argument("--python", default=sys.executable, help="the interpreter to run the programs with")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then put the results together."""
    args = parser().parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    Experiment(args).run()
    return 0


class Experiment:
    """One work folder; every step leaves a file behind and is skipped where that is there."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work.absolute()
        self.corpora = {"train": Path(args.train).absolute(), "valid": Path(args.validation).absolute()}

    def run(self) -> None:
        """All steps in order."""
        self.prepare_text()
        self.train("source", self.source_flags(), self.args.source_iters)
        for seed in self.args.seed or (1, 2, 3):
            for criterion in self.args.criteria:
                self.inherit_and_train(criterion, seed)
        results = self.collect()
        (self.work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (self.work / "results.md").write_text(table(results))
        draw(results, self.work / "curves.png")
        print(table(results))

    def program(self, name: str, *words: object, **flags: object) -> None:
        """Run a program of this repository; its output goes to the work folder's log."""
        command = [self.args.python, str(ROOT / name), *map(str, words)]
        for flag, value in flags.items():
            values = value if isinstance(value, list | tuple) else [value]
            command += [f"--{flag.replace('_', '-')}", *map(str, values)]
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        with open(self.work / "log.txt", "a", encoding="utf-8") as log:
            subprocess.run(command, check=True, cwd=self.work, stdout=log, stderr=log)

    def prepare_text(self) -> None:
        """Both tokenizers, and the datasets in the ids of each."""
        if not (self.work / "source.model").exists():
            self.program(
                "tools/train_tokenizer.py",
                input=self.corpora["train"],
                vocab_size=4096,
                sample_mb=6,
                output="source.model",
            )
        if not (self.work / "target.model").exists():
            self.program(
                "tools/compress_tokenizer.py",
                input=self.corpora["train"],
                tokenizer_model="source.model",
                vocab_size=2560,
                output="target",
            )
        for who in ("source", "target"):
            for split, corpus in self.corpora.items():
                if not (self.work / f"{who}_{split}_text_document.idx").exists():
                    self.program(
                        "tools/preprocess_data.py",
                        "--append-eod",
                        input=corpus,
                        output_prefix=f"{who}_{split}",
                        tokenizer_type="SentencePieceTokenizer",
                        tokenizer_model=f"{who}.model",
                    )

    def source_flags(self) -> dict:
        """The source's shape and rate."""
        return SOURCE | {
            "lr": 2e-3,
            "min-lr": 1e-4,
            "lr-warmup-fraction": 0.03,
            "eval-interval": 300,
            "seed": 1234,
        }

    def train(self, name: str, flags: dict, iterations: int, who: str = "source") -> None:
        """``name`` to its last iteration, into NAME/ and NAME.jsonl."""
        tracker = self.work / name / "latest_checkpointed_iteration.txt"
        if tracker.exists() and int(tracker.read_text()) >= iterations:
            return
        every = COMMON | {
            "tokenizer-model": str(self.work / f"{who}.model"),
            "train-data-path": f"{who}_train_text_document",
            "valid-data-path": f"{who}_valid_text_document",
            "data-cache-path": "cache",
            "train-iters": iterations,
            "save": name,
            "load": name,
            "save-interval": 300,
            "metrics-file": f"{name}.jsonl",
        }
        self.program("pretrain_pangu_pro.py", *SWITCHES, **every | flags)

    def inherit_and_train(self, criterion: str, seed: int) -> None:
        """One target: cut (but for criterion none: random weights), then trained."""
        name = f"{criterion}_{seed}"
        flags = TARGET | {
            "lr": self.args.lr,
            "min-lr": self.args.lr / 10,
            "lr-warmup-fraction": 0.05,
            "eval-interval": max(1, self.args.iters // 2),
            "seed": seed,
        }
        if criterion != "none":
            start = self.work / f"{name}_start"
            if not (start / "inheritance" / "report.json").exists():
                self.inherit(criterion, seed, start)
            flags["pretrained-checkpoint"] = str(start)
        self.train(name, flags, self.args.iters, "target")

    def inherit(self, criterion: str, seed: int, save: Path) -> None:
        """Cut the target out of the source."""
        shape = {f"target-{name}": value for name, value in TARGET.items()}
        self.program(
            "tools/inherit_checkpoint.py",
            load="source",
            save=save,
            **shape,
            tokenizer_model=self.work / "source.model",
            target_tokenizer_model=self.work / "target.model",
            depth_policy=self.args.depth_policy,
            width_criterion=criterion,
            seed=seed,
            data_path="target_train_text_document",
            data_cache_path="cache",
            seq_length=SEQUENCE,
            micro_batch_size=4,
            calibration_samples=32,
            mask_steps=self.args.mask_steps,
            mask_batch_size=4,
        )

    def collect(self) -> dict:
        """Criterion -> its runs: bits per byte at the start and by iteration, cost of the choice."""
        results: dict = {"source": validation(self.work / "source.jsonl"), "targets": {}}
        for criterion in CRITERIA:
            for seed in range(1, 100):
                metrics = self.work / f"{criterion}_{seed}.jsonl"
                if not metrics.exists():
                    continue
                run = {"seed": seed, "validation": validation(metrics)}
                report = self.work / f"{criterion}_{seed}_start" / "inheritance" / "report.json"
                if report.exists():
                    facts = json.loads(report.read_text())
                    run["start"] = facts["loss_after"]["bits_per_byte"]
                    run["seconds"] = facts["seconds"]
                    run["learned"] = facts.get("learned", {}) | {"losses": None}
                results["targets"].setdefault(criterion, []).append(run)
        return results


def validation(metrics: Path) -> list[tuple[int, float]]:
    """(iteration, bits per byte) of each validation in a metrics file."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(r["iteration"], r["bits_per_byte"]) for r in records if r.get("split") == "validation"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def table(results: dict) -> str:
    """Markdown: bits per byte at the start (calibration text) and at each validation."""
    runs = next(iter(results["targets"].values()))
    iterations = [iteration for iteration, _ in runs[0]["validation"]]
    head = ["start from", "runs", "step 0", *(f"step {i}" for i in iterations), "seconds to choose"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for criterion, runs in results["targets"].items():
        columns = [[run["validation"][at][1] for run in runs] for at in range(len(iterations))]
        starts = [run["start"] for run in runs if "start" in run]
        seconds = [run["seconds"] for run in runs if "seconds" in run]
        cost = f"{statistics.mean(seconds):.0f}" if seconds else "-"
        name = "random weights" if criterion == "none" else criterion
        row = [name, str(len(runs)), spread(starts), *map(spread, columns), cost]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """A curve of each criterion: the mean of its runs, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for criterion, runs in results["targets"].items():
        x = [iteration * SEQUENCE * BATCH for iteration, _ in runs[0]["validation"]]
        y = [[bits for _, bits in run["validation"]] for run in runs]
        mean = [statistics.mean(at) for at in zip(*y, strict=True)]
        name = "random weights" if criterion == "none" else criterion
        (line,) = axis.plot(x, mean, marker="o", label=name)
        axis.fill_between(
            x,
            [*map(min, zip(*y, strict=True))],
            [*map(max, zip(*y, strict=True))],
            alpha=0.15,
            color=line.get_color(),
        )
    axis.set(
        xlabel="tokens", ylabel="validation, bits per byte", title="The same target from different starts"
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

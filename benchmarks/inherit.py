"""What inheritance is worth: random weights beside slices of a larger model, at equal tokens.

    python benchmarks/inherit.py --train train_en.jsonl.gz --validation valid_en.jsonl.gz --work runs/inherit

Trains a tokenizer and a source model of 10 million parameters, compresses the tokenizer, cuts a target of
half the size out of the source by each criterion, trains each target and one with random weights for the
same tokens, all with several seeds, and writes results.json, results.md and curves.png. Every number is of
the whole held-out text, in the same windows for all. What is there already is not made again, so a run that
was cut off goes on, and several may share the work (--seed). docs/inheritance.md has what came.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import json
import statistics
import subprocess

from benchmarks.study import spread

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
    p.add_argument("--layers", type=int, nargs="+", metavar="N", help="keep these, found before")
    p.add_argument("--source-iters", type=int, default=5500, help="steps of the source (default 5500)")
    p.add_argument("--iters", type=int, default=64, help="steps of each target (default 64)")
    p.add_argument("--measure-every", type=int, metavar="N", help="steps (default: the start and the end)")
    p.add_argument("--lr", type=float, default=1e-3, help="of the targets (default 1e-3)")
    p.add_argument("--calibration-samples", type=int, default=64, help="of 256 tokens (default 64)")
    p.add_argument("--mask-steps", type=int, default=100, help="steps of learned masks (default 100)")
    p.add_argument("--mask-lr", type=float, default=0.03, help="their rate (default 0.03)")
    p.add_argument("--bf16", action="store_true", help="train and choose in bf16; measured in fp32")
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
        seeds = self.args.seed or (1, 2, 3)
        names = [f"{criterion}_{seed}" for seed in seeds for criterion in self.args.criteria]
        for name in names:
            self.inherit_and_train(name)
        self.measure(names)
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
            "eval-iters": 10,
            "seed": 1234,
        }

    def train(
        self,
        name: str,
        flags: dict,
        iterations: int,
        who: str = "source",
        program: str = "pretrain_pangu_pro.py",
    ) -> None:
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
        switches = (*SWITCHES, "--bf16") if self.args.bf16 else SWITCHES
        self.program(program, *switches, **every | flags)

    def inherit_and_train(self, name: str) -> None:
        """One target, CRITERION_SEED: cut (but for criterion none: random weights), then trained."""
        criterion, seed = name.split("_")
        flags = TARGET | {
            "lr": self.args.lr,
            "min-lr": self.args.lr / 10,
            "lr-warmup-fraction": 0.05,
            "eval-iters": 0,
            "save-interval": self.args.measure_every or self.args.iters,
            "seed": seed,
        }
        if criterion != "none":
            start = self.work / f"{name}_start"
            if not (start / "inheritance" / "report.json").exists():
                self.inherit(criterion, int(seed), start)
            flags["pretrained-checkpoint"] = str(start)
        self.train(name, flags, self.args.iters, "target")

    def inherit(self, criterion: str, seed: int, save: Path) -> None:
        """Cut the target out of the source."""
        shape = {f"target-{name}": value for name, value in TARGET.items()}
        depth = {"depth_policy": self.args.depth_policy}
        if self.args.layers:
            depth = {"depth_policy": "list", "layers": self.args.layers}
        text = {
            "data_path": "target_train_text_document",
            "data_cache_path": "cache",
            "seq_length": SEQUENCE,
            "micro_batch_size": 4,
            "calibration_samples": self.args.calibration_samples,
            "calibration_dtype": "bf16" if self.args.bf16 else "fp32",
        }
        if criterion not in ("taylor", "learned") and depth["depth_policy"] != "importance":
            text = {}  # spares the time to measure losses
        self.program(
            "tools/inherit_checkpoint.py",
            load="source",
            save=save,
            **shape,
            **depth,
            **text,
            tokenizer_model=self.work / "source.model",
            target_tokenizer_model=self.work / "target.model",
            width_criterion=criterion,
            seed=seed,
            mask_steps=self.args.mask_steps,
            mask_lr=self.args.mask_lr,
            mask_batch_size=4,
        )

    def measure(self, names: list[str]) -> None:
        """NAME.heldout.json of each run: [step, bits per byte] at the start and of every checkpoint."""
        from benchmarks.inherit_heldout import HeldOut

        held_out = None
        for name in names:
            file = self.work / f"{name}.heldout.json"
            if file.exists():
                continue
            held_out = held_out or HeldOut(
                self.work / name, self.work / "target_valid_text_document", SEQUENCE
            )
            steps = sorted(int(folder.name[5:]) for folder in (self.work / name).glob("iter_*"))
            start = self.work / f"{name}_start"
            if start.exists():
                at_start = held_out.of_checkpoint(start, 0)
            else:
                at_start = held_out.of_random_weights(self.work / name)
            ends = [(step, held_out.of_checkpoint(self.work / name, step)) for step in steps]
            values = [(0, at_start), *ends]
            print(name, values, file=sys.stderr, flush=True)
            file.write_text(json.dumps(values))

    def collect(self) -> dict:
        """Criterion -> its runs: bits per byte of held-out text by step, cost of the choice."""
        results: dict = {}
        for criterion in CRITERIA:
            for seed in range(1, 100):
                measured = self.work / f"{criterion}_{seed}.heldout.json"
                if not measured.exists():
                    continue
                run = {"seed": seed, "held_out": json.loads(measured.read_text())}
                report = self.work / f"{criterion}_{seed}_start" / "inheritance" / "report.json"
                if report.exists():
                    facts = json.loads(report.read_text())
                    run["seconds"], run["layers"] = facts["seconds"], facts["depth"]["kept"]
                    run["learned"] = facts.get("learned", {}) | {"losses": None}
                results.setdefault(criterion, []).append(run)
        return results


def steps_of(results: dict) -> list[int]:
    """The steps at which every run was measured."""
    measured = [{step for step, _ in run["held_out"]} for runs in results.values() for run in runs]
    return sorted(set.intersection(*measured))


def at(runs: list[dict], step: int) -> list[float]:
    """Bits per byte of each run at a step."""
    return [dict(run["held_out"])[step] for run in runs]


def table(results: dict) -> str:
    """Markdown: bits per byte of the held-out text by step, and below a random slice of the same seed."""
    steps = steps_of(results)
    head = ["start from", "runs", *(f"step {step}" for step in steps), "by seed", "below random slice"]
    lines = ["| " + " | ".join([*head, "seconds to choose"]) + " |", "|" + "---|" * (len(head) + 1)]
    by_lot = {run["seed"]: dict(run["held_out"])[steps[-1]] for run in results.get("random", [])}
    for criterion, runs in results.items():
        ends = {run["seed"]: dict(run["held_out"])[steps[-1]] for run in runs}
        less = [by_lot[seed] - end for seed, end in ends.items() if seed in by_lot]
        seconds = [run["seconds"] for run in runs if "seconds" in run]
        row = ["random weights" if criterion == "none" else criterion, str(len(runs))]
        row += [spread(at(runs, step), digits=3) for step in steps]
        row += [", ".join(f"{end:.3f}" for end in ends.values()), spread(less, digits=3)]
        row += [f"{statistics.mean(seconds):.0f}" if seconds else "-"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """A curve of each criterion: the mean of its runs, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for criterion, runs in results.items():
        x = [step * SEQUENCE * BATCH for step in steps_of(results)]
        columns = [at(runs, step) for step in steps_of(results)]
        name = "random weights" if criterion == "none" else criterion
        (line,) = axis.plot(x, [*map(statistics.mean, columns)], marker="o", label=name)
        axis.fill_between(x, [*map(min, columns)], [*map(max, columns)], alpha=0.15, color=line.get_color())
    axis.set(xlabel="tokens", ylabel="held-out text, bits per byte", title="One target, different starts")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

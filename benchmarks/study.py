"""Training runs that are compared: each is made once, goes on where it was cut off, and is read back.

A study is a folder: one tokenizer, the datasets of a training and of a held-out text, and a folder for
every run with its flags, log and metrics. Runs with one seed see the same samples in the same order.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: What all runs share unless they say otherwise. Validation reads the whole held-out text.
COMMON = {
    "tokenizer-type": "SentencePieceTokenizer",
    "lr-decay-style": "cosine",
    "weight-decay": 0.1,
    "adam-beta2": 0.95,
    "eval-iters": 1,
    "full-validation": True,
    "log-interval": 10,
    "save-interval": 100,
    "num-workers": 0,
}


@dataclass(frozen=True)
class Run:
    """One training run: its folder, its flags without the dashes (True for a switch), its processes."""

    name: str
    flags: dict[str, Any]
    processes: int = 1


class Study:
    """A folder of runs on one text.

    Args:
        work: the folder.
        train, validation: JSON Lines to train on and to measure with.
        vocab_size: pieces of the tokenizer, trained on ``train``.
        processes: runs at a time.
    """

    def __init__(
        self, work: Path, train: list[Path], validation: list[Path], vocab_size: int, processes: int
    ):
        self.work, self.processes = work.absolute(), processes
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self.work / "tokenizer.model"
        self._prepare(
            [path.absolute() for path in train], [path.absolute() for path in validation], vocab_size
        )

    def _prepare(self, train: list[Path], validation: list[Path], vocab_size: int) -> None:
        if not self.tokenizer.exists():
            how = {"input": train, "vocab-size": vocab_size, "sample-mb": 6, "output": self.tokenizer}
            self._program("tools/train_tokenizer.py", how)
        for name, texts in (("train", train), ("valid", validation)):
            if not (self.work / f"{name}_text_document.idx").exists():
                self._program("tools/preprocess_data.py", {
                    "input": texts, "output-prefix": self.work / name, "append-eod": True,
                    "tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": self.tokenizer,
                })  # fmt: skip

    def finish(self, runs: Iterable[Run]) -> dict[str, list[dict[str, Any]]]:
        """Train what is not trained yet; the records of each run's metrics file, by its name."""
        runs = list(runs)
        missing = [run for run in runs if not self._done(run)]
        with ThreadPoolExecutor(self.processes) as pool:
            for number, run in enumerate(pool.map(self._train, missing), start=1):
                end = validation(self._records(run))[-1]
                print(
                    f"{number}/{len(missing)} {run.name}: {end['bits_per_byte']:.4f}",
                    file=sys.stderr,
                    flush=True,
                )
        return {run.name: self._records(run) for run in runs}

    def _done(self, run: Run) -> bool:
        """Whether a run has ended; one that was made with other flags is not taken for this one."""
        done = self.work / run.name / "done.json"
        if not done.exists():
            return False
        made = json.loads(done.read_text())
        if made != run.flags:
            other = sorted(flag for flag in {*made, *run.flags} if made.get(flag) != run.flags.get(flag))
            sys.exit(
                f"{done.parent} was made with other values of {', '.join(other)}; remove it to make it again"
            )
        return True

    def _train(self, run: Run) -> Run:
        folder = self.work / run.name
        folder.mkdir(exist_ok=True)
        flags = COMMON | {
            "tokenizer-model": self.tokenizer,
            "train-data-path": self.work / "train_text_document",
            "valid-data-path": self.work / "valid_text_document",
            "data-cache-path": self.work / "cache",
            "save": folder / "checkpoints",
            "load": folder / "checkpoints",
            "metrics-file": folder / "metrics.jsonl",
        }
        self._program("pretrain_pangu_pro.py", flags | run.flags, folder / "log.txt", run.processes)
        shutil.rmtree(folder / "checkpoints")  # they served to go on
        (folder / "done.json").write_text(json.dumps(run.flags, indent=1) + "\n")
        return run

    def _records(self, run: Run) -> list[dict[str, Any]]:
        lines = (self.work / run.name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _program(self, name: str, flags: dict[str, Any], log: Path | None = None, processes: int = 1) -> None:
        """Run a program of this repository, one thread a process; what it says goes to ``log``."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / name)]
        for flag, value in flags.items():
            values = value if isinstance(value, list) else [value]
            command += [f"--{flag}", *([] if value is True else map(str, values))]
        log = log or self.work / "log.txt"
        with open(log, "a", encoding="utf-8") as file:
            environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            ended = subprocess.run(
                command, cwd=self.work, stdout=file, stderr=file, env=os.environ | environment
            )
        if ended.returncode:
            sys.exit(f"{name} ended with {ended.returncode}; {log} says why")


def validation(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements on held-out text."""
    return [record for record in records if record.get("split") == "validation"]


def bits_per_byte(records: list[dict[str, Any]]) -> float:
    """Of the held-out text, at the end of the run."""
    return validation(records)[-1]["bits_per_byte"]


def spread(values: list[float], sign: str = "", digits: int = 4) -> str:
    """Mean and standard deviation; "-" of nothing."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"

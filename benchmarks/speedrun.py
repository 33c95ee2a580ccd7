"""A row of docs/records.md: how long `tiny` takes from a dataset to 1.90 bits per byte of held-out text.

    python benchmarks/speedrun.py --work runs/speedrun "AdamW" --lr 4e-3 --train-iters 400
    python benchmarks/speedrun.py --work runs/speedrun "Muon" --optimizer muon --lr 4e-3 --train-iters 300

The flags after the name change the recipe below. Three seeds are trained on two processes of one thread, one
after the other; if each ends at 1.90 or less, the row is added to docs/records.json, and docs/records.md is
written from it. Time is what the training steps took; validation and start-up do not count. The text is
tools/make_demo_corpus.py's under the versions of constraints.txt: rows are of one text, by its hash.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import json
import platform
import statistics
import subprocess
from typing import Any

from benchmarks.study import Run, Study, bits_per_byte
from megatron_ext.common.files import sha256_file, write_aside

GOAL, SEEDS = 1.90, (1, 2, 3)
RECORDS, PAGE = ROOT / "docs/records.json", ROOT / "docs/records.md"
MARK = "<!-- rows: benchmarks/speedrun.py writes what follows -->\n"
RECIPE: dict[str, Any] = {
    "model-preset": "tiny",
    "micro-batch-size": 8,
    "global-batch-size": 16,
    "lr-warmup-fraction": 0.05,
    "eval-interval": 1_000_000,  # at the end alone
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="where everything goes")
    p.add_argument("--try", action="store_true", dest="only_try", help="one seed, and add nothing")
    p.add_argument("name", help="of the row")
    p.add_argument("flags", nargs=argparse.REMAINDER, help="of pretrain_pangu_pro.py")
    return p


def main() -> None:
    """Train, and add the row."""
    args = parser().parse_args()
    study = prepared(args.work)
    text = {name: sha256_file(study.work / name)[:16] for name in ("train.jsonl", "valid.jsonl")}
    rows = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    if rows and rows[0]["text"] != text and not args.only_try:
        sys.exit(
            f"speedrun: this installation gives another text ({text}) than the rows of {RECORDS.name} have "
            f"({rows[0]['text']}): set up with bash tools/setup.sh under the same Python"
        )
    flags = RECIPE | flags_of(args.flags)
    flags.setdefault("min-lr", float(flags["lr"]) / 10)
    folder = "".join(letter if letter.isalnum() else "-" for letter in args.name)
    runs = [
        Run(f"{folder}_{seed}", flags | {"seed": seed}, processes=2)
        for seed in SEEDS[: 1 if args.only_try else 3]
    ]
    row = {"name": args.name, "flags": " ".join(args.flags), "text": text, "machine": machine()}
    row |= measured(study.finish(runs))
    print(json.dumps(row, indent=1))
    if max(row["bits_per_byte"]) > GOAL:
        sys.exit(f"speedrun: {max(row['bits_per_byte']):.4f} bits per byte is above {GOAL}: no record")
    if not args.only_try:
        rows = [other for other in rows if other["name"] != args.name] + [row]
        write_aside(RECORDS, (json.dumps(rows, indent=1) + "\n").encode())
        write_aside(PAGE, (PAGE.read_text().split(MARK)[0] + MARK + table(rows)).encode())


def prepared(work: Path) -> Study:
    """Corpus, tokenizer and datasets, made once."""
    work.mkdir(parents=True, exist_ok=True)
    train, valid = work / "train.jsonl", work / "valid.jsonl"
    if not valid.exists():
        program: list[str | Path] = [sys.executable, ROOT / "tools/make_demo_corpus.py"]
        subprocess.run([*program, "--output", train, "--valid-output", valid], check=True)
    return Study(work, [train], [valid], vocab_size=4096, processes=1)


def flags_of(words: list[str]) -> dict[str, Any]:
    """``["--lr", "1e-3", "--bf16"]`` -> {"lr": "1e-3", "bf16": True}; several values are a list."""
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            latest = values[word.removeprefix("--")] = []
        elif not values:
            sys.exit(f"speedrun: {word} belongs to no flag")
        else:
            latest.append(word)
    return {name: found[0] if len(found) == 1 else found or True for name, found in values.items()}


def measured(records: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Seconds of the training steps, tokens and bits per byte at the end, by seed."""
    found: dict[str, list[float]] = {"seconds": [], "tokens": [], "bits_per_byte": []}
    for of_run in records.values():
        steps = [record for record in of_run if "split" not in record]
        found["seconds"].append(sum(record["elapsed_ms_per_iteration"] for record in steps) / 1000)
        found["tokens"].append(steps[-1]["consumed_tokens"])
        found["bits_per_byte"].append(bits_per_byte(of_run))
    return found


def machine() -> str:
    """Processor, Python and torch."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}"
    return f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in the order of the rows; times against the first."""
    lines = [
        "",
        "| run | million tokens | minutes | of the first | bits per byte | flags |",
        "|---|---|---|---|---|---|",
    ]
    first = statistics.mean(rows[0]["seconds"])
    for row in rows:
        seconds = row["seconds"]
        spread = f" ± {statistics.stdev(seconds) / 60:.2f}" if len(seconds) > 1 else ""
        lines.append(
            f"| {row['name']} | {statistics.mean(row['tokens']) / 1e6:.2f} | "
            f"{statistics.mean(seconds) / 60:.2f}{spread} | {statistics.mean(seconds) / first:.2f} | "
            f"{', '.join(f'{value:.4f}' for value in row['bits_per_byte'])} | `{row['flags']}` |"
        )
    text = ", ".join(f"{name} {digest}" for name, digest in rows[0]["text"].items())
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return "\n".join([*lines, "", f"Text (first half of the SHA-256): {text}. Machine: {machines}.", ""])


if __name__ == "__main__":
    main()

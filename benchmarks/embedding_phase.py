"""After inheritance, is it worth to train the rows of the vocabulary alone for a while?

    python benchmarks/embedding_phase.py --work runs/inherit --criterion taylor --iters 64 --phase 16

--work is the folder of benchmarks/inherit.py, with its source. For each seed a target is cut out of it and
trained twice for the same tokens: all of it; and first the embedding and the output layer alone for --phase
steps, then all of it. Printed are bits per byte of the held-out text at the start, after the phase, and at
the end.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import json

from benchmarks.inherit import SEQUENCE, TARGET, Experiment
from benchmarks.inherit import parser as inherit_parser

#: Trains what has a vocabulary axis, and nothing else.
WORKER = "benchmarks/embedding_phase_worker.py"


def arms(args: argparse.Namespace, seed: int) -> dict[str, list[tuple[str, int]]]:
    """Name of an arm -> (program, steps) of its parts."""
    whole, phase = "pretrain_pangu_pro.py", (WORKER, args.phase)
    return {
        f"whole_{seed}": [(whole, args.iters)],
        f"phase_{seed}": [phase, (whole, args.iters - args.phase)],
    }


def run(args: argparse.Namespace) -> list[dict]:
    """Everything that is missing; a row for each arm."""
    from benchmarks.inherit_heldout import HeldOut

    base = inherit_parser().parse_args(["--train", "x", "--validation", "x", "--work", str(args.work)])
    experiment = Experiment(base)
    rows, held_out = [], None
    for seed in args.seed:
        start = experiment.work / f"{args.criterion}_{seed}_start"
        if not (start / "inheritance" / "report.json").exists():
            experiment.inherit(args.criterion, seed, start)
        for name, parts in arms(args, seed).items():
            load, folders = start, [start]
            for number, (program, steps) in enumerate(parts):
                folder = experiment.work / f"{name}_part{number}"
                flags = TARGET | {"lr": args.lr, "min-lr": args.lr / 10, "lr-warmup-fraction": 0.05}
                flags |= {
                    "eval-iters": 0,
                    "save-interval": steps,
                    "seed": seed,
                    "pretrained-checkpoint": load,
                }
                experiment.train(folder.name, flags, steps, "target", program)
                load = folder
                folders.append(folder)
            held_out = held_out or HeldOut(load, experiment.work / "target_valid_text_document", SEQUENCE)
            steps_of = [0, *(steps for _, steps in parts)]
            values = [held_out.of_checkpoint(*each) for each in zip(folders, steps_of, strict=True)]
            rows.append({"arm": name, "bits_per_byte": values})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of benchmarks/inherit.py")
    p.add_argument("--criterion", default="taylor", help="what is kept (default taylor)")
    p.add_argument("--iters", type=int, default=64, help="steps in all (default 64)")
    p.add_argument("--phase", type=int, default=16, help="steps of the vocabulary's rows alone (default 16)")
    p.add_argument("--lr", type=float, default=1e-3, help="peak of each part (default 1e-3)")
    p.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    run(p.parse_args())


if __name__ == "__main__":
    main()

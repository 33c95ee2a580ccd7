"""A compressed tokenizer beside one newly trained on the same text, at several sizes, in one run.

    python benchmarks/compress.py --tokenizer-model big.model --input corpus/train_*.jsonl.gz \\
        --validation corpus/valid_*.jsonl.gz --sizes 48000 30000 16000 --work /tmp/vocabularies

For each size: tokens on the training and on the validation text with the most frequent pieces (the paper's
choice), with leaf removal (tools/compress_tokenizer.py), and with a new SentencePiece BPE model of that size
(tools/train_tokenizer.py), in percent of the full tokenizer's. Pieces that no text can produce are counted.
Training takes minutes; --work keeps the trained models for another run.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import json
import time

import numpy as np

from megatron_ext.data.text.sources import find_sources
from megatron_ext.tokenizer import NativeEncoder, compress
from megatron_ext.tokenizer.counts import count_text
from megatron_ext.tokenizer.train import train_tokenizer


def most_frequent(vocabulary: compress.Vocabulary, counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The pieces that must stay and the most frequent others, whether or not these can be produced."""
    fixed, others = np.flatnonzero(vocabulary.fixed), np.flatnonzero(~vocabulary.fixed)
    order = others[np.argsort(-counts.sum(axis=0)[others], kind="stable")]
    return np.sort(np.concatenate([fixed, order[: vocab_size - len(fixed)]]))


def newly_trained(inputs: list[str], vocab_size: int, work: Path) -> NativeEncoder:
    """A model of that size trained on all of the text, or the one that an earlier run left in ``work``."""
    path = work / f"trained{vocab_size}.model"
    if not path.exists():
        train_tokenizer(inputs, path, vocab_size, key="text", sample_bytes=1 << 40, seed=0)
    return NativeEncoder(path)


def contenders(args: argparse.Namespace, vocab_size: int, parts: tuple) -> dict[str, NativeEncoder]:
    """The three encoders of one size."""
    proto, vocabulary, counts = parts
    found = {}
    for name, choose in (("most frequent", most_frequent), ("leaf removal", compress.choose)):
        pruned = compress.pruned_model(proto, choose(vocabulary, counts, vocab_size))
        found[name] = NativeEncoder(model_proto=pruned.SerializeToString())
    return found | {"newly trained": newly_trained(args.input, vocab_size, args.work)}


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for the full tokenizer and for each contender of each size."""
    data = Path(args.tokenizer_model).read_bytes()
    full, proto = NativeEncoder(args.tokenizer_model), compress.read_proto(data)
    counts, _ = count_text(find_sources(args.input), full, "", args.workers)
    vocabulary = compress.describe(proto, full, False, counts.total)

    def row(name: str, encoder: NativeEncoder) -> dict:
        texts = {"training": args.input, "validation": args.validation}
        found = {k: count_text(find_sources(v), encoder, "", args.workers)[0] for k, v in texts.items()}
        tokens = {k: int(counts.total.sum()) for k, counts in found.items()}
        dead = len(compress.unreachable(encoder))
        return {"choice": name, "pieces": encoder.vocab_size, "unreachable": dead} | tokens

    rows = [row("full", full)]
    for vocab_size in args.sizes:
        for name, encoder in contenders(args, vocab_size, (proto, vocabulary, counts.counts)).items():
            rows.append(row(name, encoder))
            for text in ("training", "validation"):
                rows[-1][f"{text}_more"] = rows[-1][text] / rows[0][text] - 1
    return rows


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--tokenizer-model", required=True, metavar="FILE", help="the full SentencePiece BPE model"
    )
    p.add_argument("--input", nargs="+", required=True, metavar="PATH", help="JSON lines with the key text")
    p.add_argument("--validation", nargs="+", required=True, metavar="PATH", help="held-out JSON lines")
    p.add_argument("--sizes", nargs="+", type=int, default=[48000, 30000, 16000], metavar="V")
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps the trained models")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args()
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = measure(args)
    if args.json:
        print(json.dumps({"rows": rows, "seconds": time.monotonic() - started}))
        return
    print("| pieces | choice | unreachable | training text | validation text |\n|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['pieces']:,}", row["choice"], f"{row['unreachable']:,}"]
        for text in ("training", "validation"):
            more = f" ({row[f'{text}_more']:+.2%})" if f"{text}_more" in row else ""
            cells.append(f"{row[text]:,}{more}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""A compressed tokenizer beside one newly trained on the same text, at several sizes, in one run.

    python benchmarks/compress.py --tokenizer-model big.model --input corpus/train_*.jsonl.gz \\
        --validation corpus/valid_*.jsonl.gz --sizes 48000 30000 16000 --work /tmp/vocabularies

For each size: tokens on the training and on the validation text with the most frequent pieces (the paper's
choice), with leaf removal (tools/compress_tokenizer.py), and, beside a SentencePiece model, with a new one of
that size (tools/train_tokenizer.py), in percent of the full tokenizer's. Pieces that no text can produce are
counted.
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
from megatron_ext.tokenizer.compress import Compressible, Vocabulary, most_frequent
from megatron_ext.tokenizer.compress_run import CompressOptions, read_tokenizer
from megatron_ext.tokenizer.compress_sentencepiece import SentencePieceModel
from megatron_ext.tokenizer.counts import count_text
from megatron_ext.tokenizer.train import train_tokenizer


def newly_trained(inputs: list[str], vocab_size: int, work: Path) -> SentencePieceModel:
    """A model of that size trained on all of the text, or the one that an earlier run left in ``work``."""
    path = work / f"trained{vocab_size}.model"
    if not path.exists():
        train_tokenizer(inputs, path, vocab_size, key="text", sample_bytes=1 << 40, seed=0)
    return SentencePieceModel(path.read_bytes())


def contenders(
    args: argparse.Namespace, vocab_size: int, full: Compressible, vocabulary: Vocabulary, counts: np.ndarray
) -> dict[str, Compressible]:
    """The tokenizers of one size."""
    found = {
        "most frequent": full.compressed(most_frequent(vocabulary, counts, vocab_size), counts),
        "leaf removal": full.compressed(full.choose(vocabulary, counts, vocab_size), counts),
    }
    if isinstance(full, SentencePieceModel):
        found["newly trained"] = newly_trained(args.input, vocab_size, args.work)
    return found


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for the full tokenizer and for each contender of each size."""
    full = read_tokenizer(CompressOptions(tokenizer_model=args.tokenizer_model, output=""))
    counts, _ = count_text(find_sources(args.input), full.encoder, "", args.workers)
    vocabulary = full.vocabulary(counts.total)

    def row(name: str, tokenizer: Compressible) -> dict:
        texts = {"training": args.input, "validation": args.validation}
        found = {
            k: count_text(find_sources(v), tokenizer.encoder, "", args.workers)[0] for k, v in texts.items()
        }
        tokens = {k: int(counts.total.sum()) for k, counts in found.items()}
        dead = len(tokenizer.unreachable())
        return {"choice": name, "pieces": tokenizer.encoder.vocab_size, "unreachable": dead} | tokens

    rows = [row("full", full)]
    for vocab_size in args.sizes:
        for name, tokenizer in contenders(args, vocab_size, full, vocabulary, counts.counts).items():
            rows.append(row(name, tokenizer))
            for text in ("training", "validation"):
                rows[-1][f"{text}_more"] = rows[-1][text] / rows[0][text] - 1
    return rows


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="SentencePiece BPE model or Hugging Face folder",
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

"""How often a compact tokenizer cuts a text otherwise than the full one's pieces, undone, would be cut.

    python benchmarks/fold.py --teacher big.model --student compact.model --input corpus/train_*.jsonl.gz

A teacher with the full tokenizer reads the student's text in its own tokens
(megatron_ext/tokenizer/rejoin.py), and its distribution is folded onto the student's tokens
(megatron_ext/tokenizer/fold.py). Printed are, in percent: of the student's tokens those that end within a
piece of the teacher, where there is no target; of these, how many are not found in windows of --length
tokens, and of those found, how many are none; and of the teacher's tokens those where the student has another
token than the one that they are folded onto.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import json
from collections.abc import Sequence

import numpy as np

from megatron_ext.data.text.chunks import chunks
from megatron_ext.data.text.documents import Document, Documents
from megatron_ext.data.text.sources import find_sources
from megatron_ext.tokenizer import encoding
from megatron_ext.tokenizer.build import flags_of
from megatron_ext.tokenizer.fold import fold
from megatron_ext.tokenizer.rejoin import Rejoin


def read(inputs: Sequence[str]) -> list[bytes]:
    """The texts of all documents."""
    found = (each for chunk in chunks(find_sources(inputs), 4 << 20) for each in Documents(chunk, ["text"]))
    return [b"\n".join(each.texts[0]) for each in found if isinstance(each, Document)]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The row of a student."""
    texts = read(args.input)
    (teacher, encode), (student, encode_mine) = (
        encoding.load(flags_of(path)) for path in (args.teacher, args.student)
    )
    folded = fold(student, teacher)
    if folded is None:
        raise SystemExit("both have the same ids: nothing is folded")
    theirs, mine = (each(texts)[0].astype(np.int64) for each in (encode, encode_mine))
    their_ends, my_ends = np.cumsum(teacher.token_bytes()[theirs]), np.cumsum(student.token_bytes()[mine])
    inside = ~np.isin(my_ends, their_ends)
    begins = np.searchsorted(my_ends, np.append(0, their_ends[:-1]), side="right")
    right = mine[begins] == folded.student_of_teacher[theirs]
    right &= np.append(0, my_ends)[begins] == np.append(0, their_ends[:-1])
    windows = len(mine) // args.length * args.length
    rejoin = Rejoin(folded, student, teacher)
    found = rejoin.read(mine[:windows].reshape(-1, args.length)).rows.reshape(-1) < 0
    true = inside[:windows]
    return {
        "pieces": student.vocab_size,
        "tokens": len(mine),
        "inside": 100 * inside.mean(),
        "not_found": 100 * (true & ~found).sum() / true.sum(),
        "falsely_found": 100 * (found & ~true).sum() / found.sum(),
        "begin_otherwise": 100 * (1 - right.mean()),
    }


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--teacher", required=True, metavar="PATH", help="SentencePiece model or Hugging Face folder"
    )
    p.add_argument("--student", required=True, metavar="PATH", help="made of it by compress_tokenizer.py")
    p.add_argument("--input", nargs="+", required=True, metavar="PATH", help="JSON lines with the key text")
    p.add_argument("--length", type=int, default=2048, metavar="S", help="tokens of a window (default 2048)")
    print(json.dumps(measure(p.parse_args())))


if __name__ == "__main__":
    main()

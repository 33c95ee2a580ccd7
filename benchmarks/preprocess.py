"""Text to .bin/.idx: ours from JSON lines and parquet, beside a loop in Megatron-LM's manner, in one run.

    python benchmarks/preprocess.py --input corpus/train_*.jsonl.gz --tokenizer-model my.model --workers 2

Upstream's manner: a multiprocessing pool, imap in groups of 32 lines over one open file, sentencepiece one
document at a time, one IndexedDatasetBuilder in the parent (tools/preprocess_data.py of Megatron-LM
0.16.1). Both read the same plain JSON lines, made from --input first, and ours also reads the same texts as
parquet (zstd, row groups of --row-group-size); the outputs must be equal. They take turns, --repeats times;
medians are reported, with start-up (a run over one line) apart.

Where --tokenizer-model is a Hugging Face folder, ours over the fastest encoder is compared with ours over the
package tokenizers alone (--tokenizer-backend tokenizers).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a checkout works without being installed

import argparse
import hashlib
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time

_processor = None


def upstream(source: str, prefix: str, model: str, workers: int) -> None:
    """The loop of Megatron-LM's process_json_file and Encoder.encode."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from sentencepiece import SentencePieceProcessor

    dtype = DType.optimal_dtype(SentencePieceProcessor(model_file=model).get_piece_size())
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", dtype=dtype)
    with open(source, encoding="utf-8") as lines, multiprocessing.Pool(workers, _load, (model,)) as pool:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}_text_document.idx")


def _load(model: str) -> None:
    global _processor
    from sentencepiece import SentencePieceProcessor

    _processor = SentencePieceProcessor(model_file=model)


def _encode(line: str) -> list[int]:
    ids = _processor.encode(json.loads(line)["text"])
    return ids + [_processor.eos_id()] if ids else ids


def commands(source: Path, folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each contender, the one that ours is compared with first."""
    kind = "HuggingFaceTokenizer" if Path(args.tokenizer_model).is_dir() else "SentencePieceTokenizer"

    def ours(name: str, source: Path = source) -> list[str]:
        return [
            sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source),
            "--output-prefix", str(folder / name), "--tokenizer-type", kind,
            "--tokenizer-model", args.tokenizer_model, "--append-eod", "--workers", str(args.workers),
        ]  # fmt: skip

    mine = {"ours": ours("ours"), "parquet": ours("parquet", source.with_suffix(".parquet"))}
    if kind == "HuggingFaceTokenizer":
        return {"tokenizers": [*ours("tokenizers"), "--tokenizer-backend", "tokenizers"]} | mine
    return {
        "upstream": [
            sys.executable, __file__, "--run-upstream", str(source), str(folder / "upstream"),
            args.tokenizer_model, str(args.workers),
        ],
    } | mine  # fmt: skip


def measure(source: Path, args: argparse.Namespace, names: list[str], repeats: int) -> dict[str, dict]:
    """Median wall and CPU seconds of each contender, taking turns; checks that the outputs are equal."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for name in names:
                for old in Path(folder).glob(f"{name}*"):
                    old.unlink()
                taken[name].append(_run(commands(source, Path(folder), args)[name]))
        outputs = {_content(Path(folder, f"{name}_text_document")) for name in names}
    if len(outputs) != 1:
        sys.exit("the outputs differ")
    return {
        name: {
            "wall_s": statistics.median(w for w, _ in runs),
            "cpu_s": statistics.median(c for _, c in runs),
        }
        for name, runs in taken.items()
    }


def _content(prefix: Path) -> str:
    return hashlib.sha256(b"".join(Path(f"{prefix}.{s}").read_bytes() for s in ("bin", "idx"))).hexdigest()


def _run(command: list[str]) -> tuple[float, float]:
    import resource

    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def corpus(inputs: list[str], path: Path, max_bytes: int) -> int:
    """The inputs as plain JSON lines, line by line in turn, so that a part of it is mixed too; its bytes."""
    from megatron_ext.data.text.chunks import chunks, lines_of
    from megatron_ext.data.text.sources import find_sources

    sources = find_sources(inputs)
    cut = [chunks([source], 1 << 22) for source in sources]
    streams = [(line for chunk in stream for line in lines_of(chunk)) for stream in cut]
    written = 0
    with open(path, "wb") as file:
        while streams and written < max_bytes:
            for stream in list(streams):
                line = next(stream, None)
                if line is None:
                    streams.remove(stream)
                else:
                    written += file.write(line.rstrip(b"\n") + b"\n")
    return written


def write_parquet(source: Path, row_group_size: int) -> None:
    """The texts of JSON lines as a parquet file beside them."""
    import pyarrow
    import pyarrow.parquet

    with open(source, "rb") as lines:
        table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines]})
    path = source.with_suffix(".parquet")
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size, compression="zstd")


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--run-upstream"]:
        upstream(*sys.argv[2:5], workers=int(sys.argv[5]))
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", nargs="+", required=True, metavar="PATH", help="JSON lines with the key text")
    p.add_argument("--tokenizer-model", required=True, metavar="PATH", help="SentencePiece file, or folder")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--max-mb", type=int, default=50, help="size of the corpus (default: 50 MB)")
    p.add_argument("--row-group-size", type=int, default=1000, help="rows of a row group (default: 1000)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, first = Path(folder, "corpus.jsonl"), Path(folder, "line.jsonl")
        size = corpus(args.input, whole, args.max_mb * 10**6)
        with open(whole, "rb") as file:
            first.write_bytes(file.readline())
        for source in (whole, first):
            write_parquet(source, args.row_group_size)
        names = list(commands(whole, Path(folder), args))
        startup = measure(first, args, names, args.repeats)
        full = measure(whole, args, names, args.repeats)
    result: dict = {"corpus_bytes": size, "workers": args.workers, "repeats": args.repeats}
    for name in full:
        result[name] = full[name] | {
            "startup_s": startup[name]["wall_s"],
            "startup_cpu_s": startup[name]["cpu_s"],
            "mb_per_s": size / full[name]["wall_s"] / 1e6,
            "mb_per_cpu_s": size / full[name]["cpu_s"] / 1e6,
            "loop_mb_per_s": size / (full[name]["wall_s"] - startup[name]["wall_s"]) / 1e6,
            "loop_mb_per_cpu_s": size / (full[name]["cpu_s"] - startup[name]["cpu_s"]) / 1e6,
        }
    for unit in ("mb_per_s", "mb_per_cpu_s", "loop_mb_per_s", "loop_mb_per_cpu_s"):
        result[f"times_{unit}"] = result["ours"][unit] / result[names[0]][unit]
        result[f"parquet_times_{unit}"] = result["parquet"][unit] / result["ours"][unit]
    if args.json:
        print(json.dumps(result))
        return
    print(f"{size / 1e6:.1f} MB of JSON lines, {args.workers} workers, medians of {args.repeats}")
    for name in full:
        facts = result[name]
        print(
            f"{name:>10}: {facts['wall_s']:7.2f} s wall, {facts['cpu_s']:7.2f} s CPU, "
            f"{facts['mb_per_s']:6.2f} MB/s, {facts['mb_per_cpu_s']:.2f} MB a CPU second; "
            f"start-up {facts['startup_s']:.2f} s wall, {facts['startup_cpu_s']:.2f} s CPU"
        )
    wall, cpu = result["times_mb_per_s"], result["times_mb_per_cpu_s"]
    print(f"      ours: {wall:.1f} times in wall, {cpu:.1f} in CPU time")
    wall, cpu = result["times_loop_mb_per_s"], result["times_loop_mb_per_cpu_s"]
    print(f"      without start-up: {wall:.1f} times in wall, {cpu:.1f} in CPU time")
    wall, cpu = result["parquet_times_mb_per_s"], result["parquet_times_mb_per_cpu_s"]
    print(f"   parquet: {wall:.2f} times JSON lines in wall, {cpu:.2f} in CPU time")


if __name__ == "__main__":
    main()

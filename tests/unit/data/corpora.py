"""Inputs for the tests of data: small corpora, a tokenizer trained on the spot, upstream's own loop."""

import functools
import gzip
import hashlib
import json
import random
from pathlib import Path

import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_ext.config.data import TokenizerConfig

WORDS = "the model learns from text 中文 数据 and café naïve 🙂 def return 1234 x_y".split()


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 120 words; now and then an empty one."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 120))) for _ in range(count)]
    for i in range(7, count, 50):
        texts[i] = ""
    return texts


def write_jsonl(path: Path, texts: list[str], **more) -> Path:
    """JSON lines with the key "text", gzip-compressed if the name says so."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            extra = {key: make(i) for key, make in more.items()}
            file.write(json.dumps({"text": text} | extra, ensure_ascii=bool(i % 2)) + "\n")
    return path


@functools.cache
def train_tokenizer(folder: Path) -> Path:
    """A BPE model of 400 pieces."""
    sentences = folder / "sentences.txt"
    sentences.write_text("\n".join(filter(None, documents(200, seed=9))), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences), model_prefix=str(folder / "tiny"), vocab_size=400, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder / "tiny.model"


def flags(model: Path) -> TokenizerConfig:
    return TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))


def upstream(prefix: Path, records: list[str | list[str]], model: Path, append_eod: bool = True) -> str:
    """What Megatron-LM's preprocess_data.py writes for these texts; returns its hashes.

    Its loop (Encoder.encode, process_json_file) over sentencepiece and Megatron-Core's own builder.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    dtype = DType.optimal_dtype(processor.get_piece_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for record in records:
        sentences = record if isinstance(record, list) else [record]
        encoded = [ids for ids in (processor.encode(sentence) for sentence in sentences) if ids]
        if encoded and append_eod:
            encoded[-1].append(processor.eos_id())
        builder.add_document(sum(encoded, []), [len(ids) for ids in encoded])
    builder.finalize(f"{prefix}.idx")
    return hashes(prefix)


def hashes(prefix: str | Path) -> str:
    """sha256 of .bin and .idx."""
    return " ".join(
        hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")
    )


def make_dataset(prefix: Path, lengths: list[int], vocabulary: int = 200, seed: int = 0) -> Path:
    """A dataset of random ids, written by Megatron-Core."""
    generator = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
    for length in lengths:
        builder.add_item(torch.randint(0, vocabulary, (length,), generator=generator))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def make_blend(folder: Path) -> list[float | Path]:
    """Two datasets in ``folder``, as words of --data-path: 0.7 of one, 0.3 of the other."""
    lengths = [5, 90, 33, 1, 60, 17, 120, 8, 44, 71] * 4
    words: list[float | Path] = []
    for weight, name in ((0.7, "a"), (0.3, "b")):
        words += [weight, make_dataset(folder / name, lengths, seed=ord(name))]
    return words

"""Hugging Face folders made on the spot: byte-level BPE with the pre-tokenizers of well-known models."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.unit.data import corpora

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"\p{Lm}\p{Lo}\p{M}"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]"
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
#: The expression by which a family splits text; for gpt2 that of ByteLevel itself.
SPLIT = {
    "llama3": WORDS + r"\p{N}{1,3}" + REST,
    "qwen2": WORDS + r"\p{N}" + REST,
    "o200k": rf"{CASED}*[\p{{Ll}}{LETTERS}]+{CONTRACTION}{CASED}+[\p{{Ll}}{LETTERS}]*{CONTRACTION}"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "unknown": r"\w+|\s+|[^\w\s]+",
}
FAMILIES = ("gpt2", "smollm", *SPLIT)
SPECIAL = ("<|endoftext|>", "<|im_start|>")


def _splitting(family: str) -> pre_tokenizers.PreTokenizer:
    if family == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    split = pre_tokenizers.Split(Regex(SPLIT[family]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(folder: Path, family: str = "qwen2", **settings) -> Path:
    """A tokenizer of 400 pieces, two special tokens and one that is not; ``settings`` are the BPE model's."""
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer, tokenizer.decoder = _splitting(family), decoders.ByteLevel()
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpora.documents(50), trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return write(folder, json.loads(tokenizer.to_str()))


def write(folder: Path, description: dict, eos: str = SPECIAL[0]) -> Path:
    """A folder of this ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

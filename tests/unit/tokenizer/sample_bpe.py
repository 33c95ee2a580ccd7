"""Small tokenizers in Hugging Face's layout like those of today's models, trained when first asked for."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_ext.tokenizer import hf_export
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.tiktoken_file import FAMILIES
from tests.unit.tokenizer import sample_models as samples

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(5)]
KINDS = ("gpt2", "smollm", "qwen", "llama3", "llama2")


@functools.cache
def described(kind: str) -> str:
    """The tokenizer.json of a kind."""
    make = {"gpt2": _gpt2, "smollm": _smollm, "qwen": _qwen, "llama3": _llama3, "llama2": _llama2}
    return json.dumps(make[kind](), ensure_ascii=False)


def folder(kind: str, path: Path, **config: Any) -> Path:
    """A folder with a tokenizer of a kind."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(described(kind), encoding="utf-8")
    eos = {"llama3": "<|end_of_text|>", "llama2": "</s>"}.get(kind, CHAT[0])
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | config
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


def _trained(cutter: Any, normalizer: Any, special: list[str], in_front: bool = False) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cutter, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = {"special_tokens": special} if in_front else {}
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False, **first)
    tokenizer.train_from_iterator(samples.corpus_lines(random.Random(7)), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return json.loads(tokenizer.to_str())


def _cutter(family: str) -> Any:
    split = pre_tokenizers.Split(Regex(FAMILIES[family].pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> dict[str, Any]:
    """With a piece that the cuts never leave whole, a part of it, and added tokens that are pieces too."""
    content = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), None, CHAT)
    return _with(content, [("a", "1"), ("a1", "b"), ("Ġ", "Ġ")], whole=[], added=["import"])


def _smollm() -> dict[str, Any]:
    """Digits one by one; the special tokens have the first ids, and are pieces of the model too."""
    cutter = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return _trained(pre_tokenizers.Sequence(cutter), None, CHAT, in_front=True)


def _qwen() -> dict[str, Any]:
    return _trained(_cutter("qwen2"), normalizers.NFC(), CHAT)


def _llama3() -> dict[str, Any]:
    """Each split of a piece is listed as its merge; two pieces are only ever taken whole; text has a head."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED]
    content = _trained(_cutter("llama3"), None, special)
    content = _with(content, [], whole=["Ġzyzzyva", "的一的一"], added=[])
    vocab = content["model"]["vocab"]
    content["model"]["merges"] = [
        [piece[:i], piece[i:]]
        for piece in sorted(vocab, key=vocab.__getitem__)
        for i in range(1, len(piece))
        if piece not in ("Ġzyzzyva", _spelled("的一的一")) and piece[:i] in vocab and piece[i:] in vocab
    ]
    content["model"]["ignore_merges"] = True
    first = next(token for token in content["added_tokens"] if token["content"] == special[0])
    head = {"id": special[0], "ids": [first["id"]], "tokens": [special[0]]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": special[0], "type_id": 0}}, text]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, text],
        "special_tokens": {special[0]: head},
    }  # fmt: skip
    return content


def _llama2() -> dict[str, Any]:
    """A SentencePiece model as Hugging Face describes it, with byte fallback."""
    encoder = NativeEncoder(model_proto=samples.trained(user_defined_symbols=""))
    return json.loads(hf_export.fast_tokenizer(encoder).to_str())


def _spelled(text: str) -> str:
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return cutter.pre_tokenize_str(text)[0][0]


def _with(
    content: dict[str, Any], merges: list[tuple[str, str]], whole: list[str], added: list[str]
) -> dict[str, Any]:
    """With more pieces, behind the others and in front of the special tokens."""
    model = content["model"]
    for left, right in merges:
        if left + right not in model["vocab"]:
            model["vocab"][left + right] = len(model["vocab"])
            model["merges"].append([left, right])
    for piece in whole:
        model["vocab"][piece if piece[0] == "Ġ" else _spelled(piece)] = len(model["vocab"])
    special = content["added_tokens"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    more = [{"content": piece, "id": model["vocab"][piece]} | plain for piece in added]
    for i, token in enumerate(special):
        token["id"] = len(model["vocab"]) + i
    content["added_tokens"] = [*more, *special]
    return content

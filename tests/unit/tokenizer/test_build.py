"""Tokenizers: Megatron-Core's own ids, bytes of ids, clear errors."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.config.data import TokenizerConfig
from megatron_ext.tokenizer import TokenizerError, build_tokenizer
from tests.unit.data import corpora

TEXT = "Hello, 世界!  tabs\tand\nlines 12 🙂 naïve"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def flags(kind: str, model=None, **changes) -> TokenizerConfig:
    return TokenizerConfig(
        tokenizer_type=kind, tokenizer_model=model and str(model), tokenizer_hf_use_fast=True, **changes
    )


def upstreams(flags: TokenizerConfig):
    """The tokenizer that Megatron-Core builds of the same flags, and of those that only it has."""
    from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer

    others = ("tokenizer_special_tokens", "tokenizer_metadata", "vocab_file", "merge_file")
    values = dict.fromkeys(others) | {"tokenizer_sentencepiece_legacy": False}
    return build_tokenizer(Namespace(**vars(flags), **values))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_is_megatron_cores(model, kind):
    ours, theirs = build_tokenizer(flags(kind, model)), upstreams(flags(kind, model))
    for name in ("vocab_size", "eod", "bos", "eos", "pad"):
        assert getattr(ours, name) == getattr(theirs, name), name
    ids = ours.tokenize(TEXT)
    assert ids == theirs.tokenize(TEXT)
    assert ours.detokenize(ids) == theirs.detokenize(ids)
    assert ours.unique_identifiers["sha256"] == ours.sha256


def test_bytes_of_ids_add_up_to_the_text(model):
    tokenizer = build_tokenizer(flags("SentencePieceTokenizer", model))
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.dtype == "int32" and len(token_bytes) == tokenizer.vocab_size
    text = (
        TEXT.replace("  ", " ").replace("\t", " ").replace("\n", " ")
    )  # this model's normalizer joins blanks
    dummy_prefix = 1
    assert token_bytes[tokenizer.tokenize(text)].sum() == len(text.encode()) + dummy_prefix
    assert token_bytes[[tokenizer.eod, tokenizer.bos, tokenizer.processor.unk_id()]].tolist() == [0, 0, 0]


def test_shared_tokenizers(shared):
    for name, size in (("internlm-103168", 103168), ("llama-32000", 32000)):
        path = shared / "data" / "tokenizers" / f"{name}.model"
        tokenizer = build_tokenizer(flags("SentencePieceTokenizer", path))
        assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos) == (size, 2, 1)
        ids = tokenizer.tokenize(TEXT)
        assert tokenizer.detokenize(ids) == TEXT
        prefix = 1 if name == "llama-32000" else 0
        assert tokenizer.token_bytes()[ids].sum() == len(TEXT.encode()) + prefix


@pytest.fixture
def folder(tmp_path) -> Path:
    """A byte-level BPE tokenizer in Hugging Face's layout."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpora.documents(50), trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_hugging_face_folder(folder):
    ours = build_tokenizer(flags("HuggingFaceTokenizer", folder))
    theirs = upstreams(flags("HuggingFaceTokenizer", folder))
    ids = ours.tokenize(TEXT)
    assert ids == theirs.tokenize(TEXT) and ours.detokenize(ids) == TEXT
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    token_bytes = ours.token_bytes()
    assert token_bytes[ids].sum() == len(TEXT.encode()) and token_bytes[ours.eod] == 0
    before = ours.sha256
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>"})
    )
    assert build_tokenizer(flags("HuggingFaceTokenizer", folder)).sha256 != before


def test_null_tokenizer():
    tokenizer = build_tokenizer(flags("NullTokenizer", vocab_size=256))
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.tokenize("1 22 255") == [1, 22, 255] and tokenizer.detokenize([1, 22]) == "1 22"
    assert tokenizer.token_bytes().tolist() == [0] * 257


def test_errors_name_flag_and_file(tmp_path):
    (tmp_path / "text.model").write_text("this is no model")
    (tmp_path / "empty.model").touch()
    for arguments, message in [
        (flags("SentencePieceTokenizer", tmp_path / "none.model"), "none.model: there is no such file"),
        (flags("SentencePieceTokenizer", tmp_path / "text.model"), "text.model: not a SentencePiece model"),
        (flags("SentencePieceTokenizer", tmp_path / "empty.model"), "empty.model: the file is empty"),
        (flags("SentencePieceTokenizer", tmp_path), "it is a folder"),
        (flags("SentencePieceTokenizer"), "needs --tokenizer-model"),
        (flags("HuggingFaceTokenizer", "meta-llama/Llama-2-7b"), "nothing is downloaded"),
        (flags("NullTokenizer"), "needs --vocab-size"),
        (flags("TikTokenizer", "x"), "not supported"),
    ]:
        with pytest.raises(TokenizerError, match="--tokenizer-") as error:
            build_tokenizer(arguments)
        assert message in str(error.value)

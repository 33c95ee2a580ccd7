"""Translating a dataset equals preprocessing its text with the new tokenizer."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import check_layout, map_tokens, write_index
from megatron_ext.data.manifest import read_manifest
from megatron_ext.preprocess.options import Options
from megatron_ext.preprocess.retokenize import retokenize
from megatron_ext.preprocess.run import preprocess
from megatron_ext.tokenizer.build import flags_of
from megatron_ext.tokenizer.compress_run import CompressOptions, compress
from megatron_ext.tokenizer.compress_sentencepiece import pruned_model, read_proto
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.unit.data import corpora
from tests.unit.tokenizer import hf_folders, sample_bpe
from tests.unit.tokenizer import sample_models as samples


def write(prefix: Path, encoder: NativeEncoder, texts: list[str]) -> None:
    """A dataset of one sequence a document, each ended by </s>."""
    flat, sizes = encoder.encode_batch_into(texts, append_eod=True)
    Path(f"{prefix}.bin").write_bytes(flat.tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, flat.dtype, sizes, np.arange(len(sizes) + 1))


@pytest.mark.parametrize("prefix_blank", [False, True])
def test_equals_encoding_the_text(tmp_path, prefix_blank):
    model = samples.trained(add_dummy_prefix=prefix_blank)
    (tmp_path / "old.model").write_bytes(model)
    old = NativeEncoder(model_proto=model)
    kept = np.array([i for i in range(old.vocab_size) if i % 3 or i < 300])
    new_model = pruned_model(read_proto(model), kept).SerializeToString()
    (tmp_path / "new.model").write_bytes(new_model)
    texts = [*samples.corpus_lines(random.Random(1), 200), "", " <sep> 的\n\n🙂", "x"]
    write(tmp_path / "old", old, texts)
    names = [str(tmp_path / name) for name in ("old", "old.model", "new.model", "new")]
    summary = retokenize(*names)
    flat, sizes = NativeEncoder(model_proto=new_model).encode_batch_into(texts, append_eod=True)
    index = check_layout(tmp_path / "new")
    assert map_tokens(tmp_path / "new", index).tolist() == flat.tolist()
    assert index.lengths.tolist() == sizes.tolist()
    assert summary["documents"] == len(texts) and summary["tokens"] == len(flat) > summary["tokens_before"]


def test_equals_preprocessing_the_text_with_a_compressed_folder(tmp_path):
    """Special tokens in the text are translated too."""
    pytest.importorskip("transformers")
    full, small = sample_bpe.folder("qwen", tmp_path / "full"), tmp_path / "small_hf"
    texts = [*samples.corpus_lines(random.Random(1), 60), " 的\n\n🙂", "x", "<|im_start|>a<|im_end|>"]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    flags = {"tokenizer_model": str(full), "input": [str(source)], "vocab_size": 450}
    compress(CompressOptions(output=str(tmp_path / "small"), **flags))
    for name, model in (("a", full), ("b", small)):
        preprocess(Options([str(source)], str(tmp_path / name), flags_of(model), append_eod=True), quiet=True)
    summary = retokenize(str(tmp_path / "a_text_document"), str(full), str(small), str(tmp_path / "out"))
    assert corpora.hashes(tmp_path / "out") == corpora.hashes(str(tmp_path / "b_text_document"))
    assert summary["tokens"] > summary["tokens_before"]


def test_unknown_ids_are_refused(tmp_path):
    (tmp_path / "m.model").write_bytes(samples.trained())
    with open(tmp_path / "old.idx", "wb") as file:
        write_index(file, np.dtype(np.uint16), np.array([2], np.int32), np.arange(2))
    (tmp_path / "old.bin").write_bytes(np.array([300, 0], np.uint16).tobytes())
    model = str(tmp_path / "m.model")
    with pytest.raises(ValueError, match="its text is lost"):
        retokenize(str(tmp_path / "old"), model, model, str(tmp_path / "new"))


@pytest.mark.parametrize("old, new", [("sp", "gpt2"), ("gpt2", "sp"), ("gpt2", "llama3"), ("blank", "gpt2")])
def test_equals_preprocessing_the_text_with_a_tokenizer_of_another_kind(tmp_path, old, new):
    """A SentencePiece file and Hugging Face folders; what ends documents becomes what ends the new ones."""
    pytest.importorskip("transformers")
    special = ["a <|im_start|>"] if old == "gpt2" and new == "llama3" else []
    texts = [*samples.corpus_lines(random.Random(1), 60), " 的\n\n🙂", "x", "", "e\u0301 ", *special]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", texts)
    models = {name: _tokenizer(tmp_path / name, name) for name in (old, new)}
    for name, model in models.items():
        options = Options([str(source)], str(tmp_path / name), flags_of(model), append_eod=True)
        preprocess(options, quiet=True)
    before, after = (str(tmp_path / f"{name}_text_document") for name in (old, new))
    summary = retokenize(before, str(models[old]), str(models[new]), str(tmp_path / "out"))
    assert corpora.hashes(tmp_path / "out") == corpora.hashes(after) and summary["documents"] == len(texts)
    made, wanted = read_manifest(str(tmp_path / "out")), read_manifest(after)
    assert made["tokenizer"] == wanted["tokenizer"]
    assert made["encoders"][0]["name"] == wanted["encoders"][0]["name"]


def test_a_blank_that_byte_level_puts_in_front_is_told_from_the_texts_own(tmp_path):
    """It puts one only before a text that begins with none."""
    pytest.importorskip("transformers")
    folder = hf_folders.byte_level(tmp_path / "prefix", "gpt2")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["pre_tokenizer"]["add_prefix_space"] = True
    hf_folders.write(folder, description)
    source = corpora.write_jsonl(tmp_path / "in.jsonl", [" ", "  x\t\r\n y  ", "x", "   ", "the model"])
    preprocess(Options([str(source)], str(tmp_path / "d"), flags_of(folder), append_eod=True), quiet=True)
    retokenize(str(tmp_path / "d_text_document"), str(folder), str(folder), str(tmp_path / "out"))
    assert corpora.hashes(tmp_path / "out") == corpora.hashes(str(tmp_path / "d_text_document"))


def _tokenizer(path: Path, kind: str) -> Path:
    if kind in hf_folders.FAMILIES:
        return hf_folders.byte_level(path, kind)
    model = path.with_suffix(".model")
    model.write_bytes(samples.trained(add_dummy_prefix=kind == "blank"))
    return model

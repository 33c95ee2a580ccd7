"""Translating a dataset equals preprocessing its text with the new tokenizer."""

import json
import random
import runpy
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import check_layout, map_tokens, write_index
from megatron_ext.data.manifest import read_manifest
from megatron_ext.preprocess.options import Options
from megatron_ext.preprocess.retokenize import retokenize
from megatron_ext.preprocess.run import preprocess
from megatron_ext.tokenizer.build import flags_of
from megatron_ext.tokenizer.compress_sentencepiece import pruned_model, read_proto
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.unit.data import corpora
from tests.unit.tokenizer import hf_folders
from megatron_ext.tokenizer.compress_run import CompressOptions, compress
from tests.unit.tokenizer import sample_bpe
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


@pytest.mark.parametrize("old, new", [("qwen", "qwen"), ("llama3", "sp"), ("sp", "gpt2"), ("llama2", "sp")])
def test_equals_preprocessing_the_text_with_any_kind(tmp_path, old, new):
    """Also of Hugging Face folders, and to a compressed one; special tokens in the text are translated."""
    pytest.importorskip("transformers")
    ours, theirs = (folder_of(kind, tmp_path / name) for name, kind in (("old", old), ("new", new)))
    shared = ["<|im_start|>a<|im_end|>"] if old == new else []
    lines = [
        *samples.corpus_lines(random.Random(1), 60),
        " <sep> 的\n\n🙂",
        "x",
        "\n",
        " two  blanks",
        *shared,
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    if old == new:
        flags = {"tokenizer_model": str(ours), "input": [str(tmp_path / "in.jsonl")], "vocab_size": 450}
        compress(CompressOptions(output=str(tmp_path / "small"), **flags))
        theirs = tmp_path / "small_hf"
    for name, tokenizer in (("a", ours), ("b", theirs)):
        kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else "SentencePieceTokenizer"
        flags = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / name, "--append-eod"]
        assert tool("preprocess_data", *flags, "--tokenizer-type", kind, "--tokenizer-model", tokenizer) == 0
    names = [tmp_path / "a_text_document", ours, theirs, tmp_path / "c"]
    summary = retokenize(*map(str, names))
    made, right = (tmp_path / f"{name}.bin" for name in ("c", "b_text_document"))
    assert made.read_bytes() == right.read_bytes() and summary["documents"] == len(lines)
    manifests = [json.loads(path.with_suffix(".json").read_text()) for path in (made, right)]
    assert manifests[0]["tokenizer"] == manifests[1]["tokenizer"]


def folder_of(kind: str, path: Path) -> Path:
    """A tokenizer of a kind: a SentencePiece file or a Hugging Face folder."""
    if kind != "sp":
        return sample_bpe.folder(kind, path)
    path.write_bytes(samples.trained())
    return path


def tool(name: str, *argv: object) -> int:
    path = Path(__file__).parents[3] / "tools" / f"{name}.py"
    return runpy.run_path(str(path))["main"]([str(word) for word in argv])


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


def _tokenizer(path: Path, kind: str) -> Path:
    if kind in hf_folders.FAMILIES:
        return hf_folders.byte_level(path, kind)
    model = path.with_suffix(".model")
    model.write_bytes(samples.trained(add_dummy_prefix=kind == "blank"))
    return model

"""Encoders of Hugging Face tokenizers: the ids of the package tokenizers, by whatever library."""

import functools
import json
import random
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.data import TokenizerConfig
from megatron_ext.preprocess.options import Options, PreprocessError
from megatron_ext.preprocess.run import preprocess
from megatron_ext.tokenizer import NativeEncoder, TokenizerError, build_tokenizer, checked, huggingface
from megatron_ext.tokenizer.build import HuggingFaceTokenizer, flags_of
from megatron_ext.tokenizer.checked import Checked, Encoder, EncodersDiffer
from megatron_ext.tokenizer.encoding import load, make_encode
from megatron_ext.tokenizer.hf_export import folder_files
from tests.unit.data import corpora
from tests.unit.tokenizer import hf_folders
from tests.unit.tokenizer import sample_models as samples

pytest.importorskip("transformers")
needs_gigatoken = pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken is not installed")
LETTERS = str.maketrans("0123456789f", "ghklmnopqr ")
_TEMPLATE = (("SpecialToken", "<|im_start|>"), ("Sequence", "A"))
SPELLED = ["<|endoftext|>", "<|im_start|>", "<|im_start", "<think>", "</s>", "<s>", "<unk>", "<0x41>"]


def flags(folder: Path, **changes) -> TokenizerConfig:
    return TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        tokenizer_hf_use_fast=True,
        **changes,
    )


def texts() -> list[str]:
    """Words, mixed scripts, controls and tokens spelled out; characters that few Unicode tables know."""
    rng = random.Random(3)
    made = [samples.hard_text(rng, [*SPELLED, *corpora.WORDS, "e\u0301", "\u212b"]) for _ in range(1500)]
    newest = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code)) == "Cn"]
    return [*corpora.documents(60), *made, *(f"a{''.join(rng.choices(newest, k=3))} b" for _ in range(200))]


def assert_equal(encoder: Encoder, tokenizer: HuggingFaceTokenizer, given: list[str]) -> None:
    """The encoder's ids are those of the tokenizer's own library for each text alone."""
    ids, sizes = encoder([text.encode() for text in given])
    own = [tokenizer.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in given]
    assert sizes.tolist() == list(map(len, own))
    assert ids.tolist() == [i for each in own for i in each]


@needs_gigatoken
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2", "o200k"])
def test_gigatoken_gives_the_ids_of_tokenizers(tmp_path, family):
    tokenizer, encoder = load(
        flags(hf_folders.byte_level(tmp_path, family, ignore_merges=family == "llama3"))
    )
    assert encoder.name.startswith("gigatoken ") and encoder.reference.name.startswith("tokenizers ")
    assert_equal(encoder, tokenizer, texts())
    word = "".join(random.Random(1).choices("abcdefg", k=100_000))
    assert_equal(encoder, tokenizer, [word, "", "中" * 30_000, "\0", " " * 10_000])


@needs_gigatoken
def test_gigatoken_forgets_its_words_where_memory_grows(tmp_path, monkeypatch):
    tokenizer, encoder = load(flags(hf_folders.byte_level(tmp_path)))
    loads, loading = [], huggingface._Gigatoken._load
    monkeypatch.setattr(huggingface, "MEMORY", 4 << 20)
    monkeypatch.setattr(huggingface._Gigatoken, "_load", lambda self: loads.append(loading(self)))
    gigatoken, draw = huggingface._Gigatoken(tokenizer.tokenizer.backend_tokenizer.to_str()), random.Random(0)
    for _ in range(20):
        text = draw.randbytes(200_000).hex().translate(LETTERS).encode()  # words that came never before
        ids = gigatoken.encoder()(text)
    assert 1 < len(loads) < 20 and ids.tolist() == encoder([text])[0].tolist()


@pytest.mark.parametrize("family", ["smollm", "unknown"])
def test_what_gigatoken_does_not_read_is_encoded_by_tokenizers(tmp_path, caplog, family):
    checked.say_once.cache_clear()
    tokenizer, encoder = load(flags(hf_folders.byte_level(tmp_path, family)))
    assert encoder.name.startswith("tokenizers ") and encoder.reference is None
    assert "about ten times slower" in caplog.text and len(caplog.records) == 1
    assert_equal(encoder, tokenizer, texts()[:100])


def test_without_gigatoken_the_log_says_how_to_get_it(tmp_path, caplog, monkeypatch):
    checked.say_once.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    _, encoder = load(flags(hf_folders.byte_level(tmp_path)))
    assert encoder.name.startswith("tokenizers ") and "pip install gigatoken" in caplog.text


@pytest.mark.parametrize("dummy_prefix", [False, True])
@pytest.mark.parametrize("blanks", ["normalizer", "Metaspace"])
def test_a_sentencepiece_model_in_disguise_is_encoded_natively(tmp_path, dummy_prefix, blanks):
    """As Llama 2 and Mistral spell it; texts with an added token, and U+2581 in front, by tokenizers."""
    proto = samples.trained(
        add_dummy_prefix=dummy_prefix, user_defined_symbols="" if dummy_prefix else "<sep>"
    )
    description = json.loads(folder_files(NativeEncoder(model_proto=proto), proto)["tokenizer.json"])
    if blanks == "Metaspace":
        scheme = "first" if dummy_prefix else "never"
        description["normalizer"] = None
        description["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False,
        }  # fmt: skip
    tokenizer, encoder = load(flags(hf_folders.write(tmp_path, description, "</s>")))
    assert encoder.name.startswith("megatron_ext ") and encoder.reference.name.startswith("tokenizers ")
    assert_equal(encoder, tokenizer, [*texts(), " a", "▁a", "  ", "<sep> b", "a</s>b"])


def test_merges_in_another_order_than_sentencepieces_are_not_encoded_natively(tmp_path):
    proto = samples.trained(user_defined_symbols="")
    description = json.loads(folder_files(NativeEncoder(model_proto=proto), proto)["tokenizer.json"])
    merges = description["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    part = next(piece for piece in made if len(piece) == 3)  # made first by its two characters and one
    merges.append([part[0], part[1:]] if part[1:] in made else [part[:2], part[2:]])
    random.Random(0).shuffle(merges)
    tokenizer, encoder = load(flags(hf_folders.write(tmp_path, description, "</s>")))
    assert not encoder.name.startswith("megatron_ext ")
    assert_equal(encoder, tokenizer, texts()[:300])


def test_spelled_out_special_tokens(tmp_path):
    """As the tokenizer's own library: sentencepiece takes them for text, Hugging Face for the tokens."""
    (tmp_path / "sp.model").write_bytes(proto := samples.trained(user_defined_symbols=""))
    _, encoder = load(flags_of(tmp_path / "sp.model"))
    ids, _ = encoder([b"a</s>b"])
    assert 2 not in ids and len(ids) > 4
    description = json.loads(folder_files(NativeEncoder(model_proto=proto), proto)["tokenizer.json"])
    _, encoder = load(flags(hf_folders.write(tmp_path / "disguise", description, "</s>")))
    assert encoder([b"a</s>b"])[0].tolist().count(2) == 1
    tokenizer, encoder = load(flags(hf_folders.byte_level(tmp_path / "bytes")))
    ids = encoder([b"a<|endoftext|>b <think>"])[0].tolist()
    assert ids.count(tokenizer.eod) == 1 and ids[-1] == tokenizer.vocab_size - 1


def test_settings_that_decide_ids(tmp_path):
    """Truncation is transformers' own matter; special tokens that it adds are added."""
    description = json.loads((hf_folders.byte_level(tmp_path / "a") / "tokenizer.json").read_text())
    description["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    template = [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    description["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": [],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    folder, text = hf_folders.write(tmp_path / "b", description), "the model learns from text"
    for special in (False, True):
        tokenizer, encoder = load(flags(folder, tokenizer_hf_include_special_tokens=special))
        ids = encoder([text.encode()])[0].tolist()
        assert ids == tokenizer.tokenize(text) and len(ids) > 3 and (ids[0] == 1) == special


def test_added_tokens_that_strip_blanks(tmp_path):
    description = json.loads((hf_folders.byte_level(tmp_path / "a") / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token |= {"lstrip": True, "rstrip": True}
    tokenizer, encoder = load(flags(hf_folders.write(tmp_path / "b", description)))
    text = "a <think> b <|im_start|>  c"
    assert None not in tokenizer.tokenize(text)
    assert_equal(encoder, tokenizer, [text, *texts()[:200]])


def test_ids_with_holes(tmp_path):
    description = json.loads((hf_folders.byte_level(tmp_path / "a") / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 18
    tokenizer, encoder = load(flags(hf_folders.write(tmp_path / "b", description)))
    assert tokenizer.vocab_size == vocabulary[last] + 1 > len(tokenizer.tokenizer)
    text = tokenizer.token_texts()[-1]
    assert text.decode() == last.replace("Ġ", " ") and encoder([text])[0].tolist() == [vocabulary[last]]
    assert tokenizer.token_texts()[-2] == b"" and len(tokenizer.token_bytes()) == tokenizer.vocab_size


@functools.cache
def damaged(encoder: Encoder) -> Encoder:
    """The encoder, with another id for each text that holds a comma."""

    def encode(given):
        ids, sizes = encoder.encode(given)
        starts = np.cumsum(sizes) - sizes
        ids[[start for start, text in zip(starts, given, strict=True) if b"," in text]] ^= 1
        return ids, sizes

    return Encoder(encoder.name, encode, encoder.reference)


@needs_gigatoken
def test_the_first_texts_and_a_sample_are_compared(tmp_path, monkeypatch):
    _, encoder = load(flags(hf_folders.byte_level(tmp_path)))
    given = [f"text number {i}".encode() for i in range(2000)]
    check = Checked(encoder)
    ids, _ = check(given[:1000])
    check(given[1000:])
    assert check.texts == 2000 and 16 + 2 <= check.compared <= 16 + 25
    one_by_one = Checked(encoder)
    for text in given:
        one_by_one([text])
    assert one_by_one.compared == check.compared
    with pytest.raises(EncodersDiffer) as error:
        Checked(damaged(encoder))([b"a", b"b,c"])
    assert error.value.text == 1 and "gives other ids than tokenizers" in error.value.reason


@needs_gigatoken
@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_difference_ends_the_run_and_names_the_line(tmp_path, monkeypatch, how):
    folder = hf_folders.byte_level(tmp_path / "t")
    given = [*corpora.documents(9), "a, b"]
    source = corpora.write_jsonl(tmp_path / "in.jsonl", given)
    right = huggingface._with_gigatoken
    monkeypatch.setattr(huggingface, "_with_gigatoken", lambda *args: damaged(right(*args)))
    monkeypatch.setattr(huggingface, "_require_equal", lambda *_: None)
    options = Options([str(source)], str(tmp_path / "out"), flags(folder), on_bad_line=how, workers=1)
    with pytest.raises(PreprocessError, match=r"jsonl: line 10: gigatoken .* other ids.*--tokenizer-backend"):
        preprocess(options, quiet=True)
    assert not list(tmp_path.glob("out*"))
    options.tokenizer_backend = "tokenizers"
    assert preprocess(options, quiet=True)["datasets"]


@needs_gigatoken
def test_datasets_are_those_of_tokenizers_and_say_who_encoded(tmp_path):
    folder = hf_folders.byte_level(tmp_path / "t")
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.documents(600))

    def run(name: str, **changes) -> tuple[str, dict]:
        values = {"append_eod": True, "chunk_bytes": 8000} | changes
        preprocess(Options([str(source)], str(tmp_path / name), flags(folder), **values), quiet=True)
        prefix = f"{tmp_path / name}_text_document"
        return corpora.hashes(prefix), json.loads(Path(f"{prefix}.json").read_text())["encoders"]

    one, two, own = (
        run("a", workers=1),
        run("b", workers=3),
        run("c", workers=2, tokenizer_backend="tokenizers"),
    )
    assert one == two and one[0] == own[0]
    (entry,), (slow,) = one[1], own[1]
    assert entry["name"].startswith("gigatoken 0.") and entry["compared_with"].startswith("tokenizers 0.")
    assert entry["texts"] == 600 and 16 <= entry["texts_compared"] < 40
    assert slow["compared_with"] is None and slow["texts_compared"] == 0


@pytest.mark.slow
@needs_gigatoken
@pytest.mark.parametrize("name", ["qwen2-151646", "p50k-50283"])
def test_shared_byte_level_tokenizers(shared, name):
    tokenizer, encoder = load(flags(shared / "data" / "tokenizers" / name))
    assert encoder.name.startswith("gigatoken ")
    assert_equal(encoder, tokenizer, texts())


def test_flags_of_another_kind_are_refused(tmp_path):
    options = Options(["x"], "y", TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=9))
    options.tokenizer_backend = "tokenizers"
    assert options.problems() == ["--tokenizer-backend tokenizers is for HuggingFaceTokenizer"]
    ids, sizes = make_encode(build_tokenizer(options.tokenizer))([b"1 2", b"", b"3"])
    assert ids.tolist() == [1, 2, 3] and sizes.tolist() == [2, 0, 1]


def test_dropout_is_refused(tmp_path):
    """It gives a text other ids each time."""
    folder = hf_folders.byte_level(tmp_path, "gpt2", dropout=0.1)
    with pytest.raises(TokenizerError, match="tokenizer.json has a dropout of 0.1"):
        build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model": null}'])
def test_a_folder_that_describes_nothing_is_refused_in_words(tmp_path, content):
    folder = hf_folders.byte_level(tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer.json(: not JSON, or cut short| describes no model)"):
        build_tokenizer(flags(folder))


def described(folder: Path) -> dict:
    return json.loads((hf_folders.byte_level(folder) / "tokenizer.json").read_text())


def preprocessed(folder: Path, **options) -> dict:
    """A run over one document with the tokenizer of ``folder``."""
    source = corpora.write_jsonl(folder.parent / "in.jsonl", ["a b"])
    return preprocess(
        Options([str(source)], str(folder.parent / "out"), flags(folder), **options), quiet=True
    )


def test_an_end_of_documents_that_the_files_lack(tmp_path, caplog):
    """transformers adds it behind the vocabulary; without --append-eod no document has it."""
    folder = hf_folders.write(tmp_path / "folder", described(tmp_path / "full"), eos="</s>")
    with pytest.raises(TokenizerError, match="end with '</s>', which tokenizer.json lacks: .* id, 320"):
        preprocessed(folder, append_eod=True)
    assert not list(tmp_path.glob("out*"))
    preprocessed(folder)
    assert "documents end with '</s>', which tokenizer.json lacks" in caplog.text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"320": {"content": "</s>", "special": True}}  # now a file has it
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    preprocessed(folder, append_eod=True)


def test_an_id_of_two_meanings(tmp_path, caplog):
    """An added token on a piece's id is moved by the library; two pieces of one id cannot be told apart."""
    description = described(tmp_path / "full")
    description["added_tokens"].append(description["added_tokens"][0] | {"id": 300, "content": "<x>"})
    preprocessed(hf_folders.write(tmp_path / "moved", description))
    assert "gives '<x>' id 300, which is taken; transformers gives it 320" in caplog.text
    description = described(tmp_path / "full")
    description["model"]["vocab"]["Q"] = description["model"]["vocab"]["Z"]
    with pytest.raises(TokenizerError, match=r"id \d+ is both '[QZ]' and '[QZ]'"):
        preprocessed(hf_folders.write(tmp_path / "twice", description))

"""Compressed BPE tokenizers of Hugging Face: exact size, nothing dead, exact round trip, their folders."""

import base64
import gzip
import itertools
import json
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megatron_ext.tokenizer import compress
from megatron_ext.tokenizer.bits_per_byte import byte_level_text
from megatron_ext.tokenizer.checked import Checked, Encoder
from megatron_ext.tokenizer.compress_huggingface import Drop, HuggingFaceEncoder, HuggingFaceModel
from megatron_ext.tokenizer.counts import Counts
from megatron_ext.tokenizer.hf_folder import HuggingFaceFolder, write_folder
from megatron_ext.tokenizer.idmap import IdMap
from megatron_ext.tokenizer.tiktoken_file import FAMILIES, as_folder
from tests.unit.tokenizer import sample_bpe
from tests.unit.tokenizer import sample_models as samples

TOOLS = Path(__file__).parents[3] / "tools"
LINES = samples.corpus_lines(random.Random(8), 900)
#: In NFC, and without characters whose texts do not come back from a model with a blank in front.
TEXTS = [
    *samples.corpus_lines(random.Random(9), 100),
    "новое 🙂\n\tx  ",
    "的 一是 zyzzyva 12345 ￥",
    "\r\n\r\n a1b",
]


def model_of(description: str, drop: Drop | None = None) -> HuggingFaceModel:
    return HuggingFaceModel(HuggingFaceFolder.alone("sample", description.encode(), "sha", {}), drop)


def sample(kind: str, drop: Drop | None = None) -> HuggingFaceModel:
    return model_of(sample_bpe.described(kind), drop)


def counted(model: HuggingFaceModel, lines: list[str] = LINES) -> np.ndarray:
    """int64 [1, vocabulary]."""
    ids = np.concatenate(model.encode_batch(lines))
    return np.bincount(ids.astype(np.int64), minlength=len(model.bpe.pieces))[None]


def shrunk(model: HuggingFaceModel, size: int) -> tuple[HuggingFaceModel, np.ndarray]:
    counts = counted(model)
    kept = model.choose(model.vocabulary(counts[0]), counts, size)
    return model.compressed(kept, counts), kept


@pytest.mark.parametrize("kind", sample_bpe.KINDS)
@pytest.mark.parametrize("size", [700, 420])
def test_exact_size_nothing_dead_exact_round_trip(kind, size):
    full = sample(kind)
    new, kept = shrunk(full, size)
    vocabulary = full.vocabulary(counted(full)[0])
    assert size == len(kept) == len(new.bpe.pieces)
    assert new.unreachable() == []
    assert set(np.flatnonzero(vocabulary.fixed)) <= set(kept.tolist())
    assert [full.bpe.pieces[i] for i in kept] == new.bpe.pieces
    assert new.round_trip(TEXTS) == (sum(map(len, new.encode_batch(TEXTS))), 0)


@pytest.mark.parametrize("kind", sample_bpe.KINDS)
def test_text_of_kept_pieces_is_encoded_as_before(kind):
    """Where every id of a text stays, the ids are the same; so every piece that was its own text still is."""
    full = sample(kind)
    new, kept = shrunk(full, 500)
    ids = {old: new_id for new_id, old in enumerate(kept.tolist())}
    pieces = [full.bpe.text(i, piece).decode(errors="ignore") for i, piece in enumerate(full.bpe.pieces)]
    draw = random.Random(0)
    texts = [*pieces, *TEXTS, *("".join(draw.choices(pieces, k=4)) for _ in range(2000))]
    same = 0
    for text, before, after in zip(texts, full.encode_batch(texts), new.encode_batch(texts), strict=True):
        if ids.keys() >= set(before):
            assert after == [ids[i] for i in before], text
            same += 1
    assert same > 500


@pytest.mark.parametrize("kind", sample_bpe.KINDS)
def test_what_is_kept_is_closed_and_shorter_than_pruning_by_counts(kind):
    full = sample(kind)
    counts = counted(full)
    vocabulary = full.vocabulary(counts[0])
    frequent = compress.most_frequent(vocabulary, counts, 450)
    naive = full.compressed(frequent, counts)
    new, kept = shrunk(full, 450)
    assert all(set(vocabulary.parts[i]) <= set(kept.tolist()) for i in kept)
    assert naive.unreachable() != []
    assert counted(new).sum() < counted(naive).sum()


def test_dead_pieces_are_those_that_no_text_gives():
    """Every text of up to six of four characters, encoded with random merges of them: what comes out."""
    draw = random.Random(3)
    alphabet = ["a", "b", "1", "Ġ"]
    for _ in range(8):
        merges, vocab = [], {piece: i for i, piece in enumerate(alphabet)}
        while len(vocab) < 24:
            left, right = draw.choices(list(vocab), k=2)
            if len(left + right) <= 4 and (left, right) not in merges:
                merges.append((left, right))
                vocab.setdefault(left + right, len(vocab))
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        full = model_of(tokenizer.to_str())
        texts = ["".join(text) for n in range(1, 7) for text in itertools.product("ab1 ", repeat=n)]
        given = np.flatnonzero(counted(full, texts)[0])
        vocabulary = full.vocabulary(np.zeros(len(vocab), dtype=np.int64))
        made_of = set(given.tolist())
        for i in sorted(given, key=lambda i: -len(full.bpe.pieces[i])):
            made_of |= {part for i in (i, *vocabulary.parts[i]) for part in vocabulary.parts[i]}
        alive = np.flatnonzero(~vocabulary.dead).tolist()
        assert set(given) <= set(alive) <= made_of
        assert len(alive) < len(vocab), "the merges made no dead piece"


def test_pieces_that_are_cut_or_listed_without_their_merge_go_first():
    gpt2, llama3 = sample("gpt2"), sample("llama3")
    for model, pieces in ((gpt2, {"a1", "a1b"}), (llama3, set())):
        vocabulary = model.vocabulary(counted(model)[0])
        assert {model.bpe.pieces[i] for i in np.flatnonzero(vocabulary.dead)} == pieces
    # Taken whole or not at all: the parts are what merges give; one more token each.
    i = llama3.bpe.pieces.index("Ġzyzzyva")
    vocabulary = llama3.vocabulary(counted(llama3)[0])
    assert "".join(vocabulary.texts[part] for part in vocabulary.parts[i]) == " zyzzyva"
    assert len(vocabulary.parts[i]) > 2 and llama3.encode_batch([" zyzzyva"]) == [[i]]
    counts = counted(llama3, [*LINES, " zyzzyva" * 1000])
    kept = llama3.choose(llama3.vocabulary(counts[0]), counts, 420)
    new = llama3.compressed(kept, counts)
    assert i in kept and new.unreachable() == []
    assert new.encode_batch([" zyzzyva"]) == [[new.bpe.pieces.index("Ġzyzzyva")]]


def test_a_token_that_merges_make_too_keeps_its_merge():
    full = sample("gpt2")
    new, _ = shrunk(full, 420)
    i = new.bpe.pieces.index("import")
    # Not as an added token, which is looked for in front of merges.
    assert [token.id for token in new.tokenizer.model.tokenize("import")] == [i]
    assert new.encode_batch(["ximporty"])[0][1] == i


def test_added_tokens_go_if_they_are_named():
    fillers, named = Drop(fillers=True), Drop(patterns=["<|reserved_special_token_[0-2]|>", "import"])
    new, _ = shrunk(sample("llama3", fillers), 420)
    assert not set(sample_bpe.RESERVED) & set(new.bpe.pieces)
    counts = counted(sample("llama3"), [*LINES, sample_bpe.RESERVED[1]])
    model = sample("llama3", fillers)
    kept = model.choose(model.vocabulary(counts[0]), counts, 420)
    assert set(sample_bpe.RESERVED) & {model.bpe.pieces[i] for i in kept} == {sample_bpe.RESERVED[1]}
    with pytest.raises(compress.CompressionError, match="import: no added token"):
        shrunk(sample("llama3", named), 420)
    new, _ = shrunk(sample("llama3", Drop(patterns=named.patterns[:1])), 420)
    assert set(sample_bpe.RESERVED) & set(new.bpe.pieces) == set(sample_bpe.RESERVED[3:])
    with pytest.raises(compress.CompressionError, match="begin_of_text.* is needed"):
        shrunk(sample("llama3", Drop(patterns=["<|*|>"])), 420)
    # A token that merges make is a piece like others when it is no added token any more.
    new, _ = shrunk(sample("gpt2", Drop(patterns=["import"])), 860)
    assert "import" in new.bpe.vocab and "import" not in {t["content"] for t in new.bpe.added.values()}


def test_text_around_a_text_has_the_new_ids():
    new, _ = shrunk(sample("llama3"), 500)
    assert new.tokenizer.encode("").ids == [new.bpe.pieces.index("<|begin_of_text|>")]


@pytest.mark.parametrize("kind", sample_bpe.KINDS)
def test_impossible_sizes_are_refused(kind):
    with pytest.raises(
        compress.CompressionError, match=r"\d+ pieces must stay .* raise --vocab-size to 2\d\d "
    ):
        shrunk(sample(kind), 100)
    with pytest.raises(compress.CompressionError, match="fewer than the"):
        shrunk(sample(kind), 10**6)
    size = len(sample(kind).bpe.pieces)
    if kind == "gpt2":
        with pytest.raises(compress.CompressionError, match=f"only {size - 2} of {size} pieces can be prod"):
            shrunk(sample(kind), size - 1)


def as_tiktoken(kind: str) -> bytes:
    """The pieces of a kind, in the order of their ids, as a .tiktoken file."""
    vocab = json.loads(sample_bpe.described(kind))["model"]["vocab"]
    lines = [
        f"{base64.b64encode(byte_level_text(piece)).decode()} {i}\n"
        for i, piece in enumerate(sorted(vocab, key=vocab.get))
    ]
    return "".join(lines).encode()


@pytest.mark.parametrize("kind, family", [("qwen", "qwen2"), ("llama3", "llama3"), ("gpt2", "gpt2")])
def test_a_tiktoken_file_gives_the_ids_of_the_folder(kind, family):
    full, read = sample(kind), HuggingFaceModel(as_folder(Path("x"), as_tiktoken(kind), FAMILIES[family]))
    texts = [*TEXTS, *LINES, "".join(FAMILIES[family].special[:2])]
    special = {token["content"] for token in full.bpe.added.values()}
    for text, ours, theirs in zip(texts, read.encode_batch(texts), full.encode_batch(texts), strict=True):
        if not any(token in text for token in special):
            assert ours == theirs, text
    assert read.bpe.ignore_merges and len(read.bpe.added) == len(FAMILIES[family].special)
    new, _ = shrunk(read, 600)
    assert new.unreachable() == [] and new.round_trip(TEXTS)[1] == 0


def test_tiktokens_own_ids():
    tiktoken = pytest.importorskip("tiktoken")
    data, family = as_tiktoken("llama3"), FAMILIES["llama3.1"]
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, data.splitlines())}
    special = {text: len(ranks) + i for i, text in enumerate(family.special)}
    theirs = tiktoken.Encoding("x", pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=special)
    ours = HuggingFaceModel(as_folder(Path("x"), data, family))
    draw = random.Random(1)
    texts = [*TEXTS, *(samples.hard_text(draw, sample_bpe.RESERVED) for _ in range(500))]
    for text in texts:
        assert ours.encode_batch([text]) == [theirs.encode(text, allowed_special="all")], text


@pytest.mark.parametrize("kind", sample_bpe.KINDS)
def test_the_tool_writes_a_folder(kind, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder = sample_bpe.folder(kind, tmp_path / "full", chat_template="{{ messages }}", model_max_length=77)
    full = HuggingFaceModel(HuggingFaceFolder.read(folder))
    some = list(full.bpe.added)[-2:]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": some, "top_p": 0.5}))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    flags = ["--tokenizer-model", folder, "--input", tmp_path / "in.jsonl", "--vocab-size", 500]
    flags += ["--output", tmp_path / "out" / "small", "--json"]
    assert tool(flags) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["new_size"] == 500 and summary["unreachable_after"] == 0
    assert 0 < summary["measured"]["more_tokens"] < 0.5
    ids = IdMap.load(tmp_path / "out" / "small.idmap.npz")
    new = HuggingFaceModel(HuggingFaceFolder.read(tmp_path / "out" / "small_hf"))
    assert (ids.old_sha256, ids.new_sha256, ids.new_size) == (full.sha256, new.sha256, 500)
    assert [full.bpe.pieces[i] for i in ids.old_id] == new.bpe.pieces
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "small_hf")
    assert loaded.chat_template == "{{ messages }}" and loaded.model_max_length == 77
    for text in TEXTS:
        assert loaded.encode(text, add_special_tokens=False) == new.encode_batch([text])[0]
    generation = json.loads((tmp_path / "out" / "small_hf" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": ids.new_id[some].tolist(), "top_p": 0.5}


def test_a_folder_as_transformers_writes_it(tmp_path):
    """With every token in its configurations, and a template of several steps; fillers are gone from all."""
    transformers = pytest.importorskip("transformers")
    content = json.loads(sample_bpe.described("llama3"))
    bytes_last = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    content["post_processor"] = {"type": "Sequence", "processors": [bytes_last, content["post_processor"]]}
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_type_id": 0,
        "pad_id": content["added_tokens"][2]["id"], "pad_token": sample_bpe.RESERVED[0],
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    special = {"eos_token": "<|end_of_text|>", "additional_special_tokens": sample_bpe.RESERVED[1:3]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}} | special
    for token in content["added_tokens"]:
        plain = {name: value for name, value in token.items() if name != "id"}
        config["added_tokens_decoder"][str(token["id"])] = plain
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({t["content"]: t["id"] for t in content["added_tokens"]})
    )
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    for folder in (tmp_path, tmp_path / "full"):
        model = HuggingFaceModel(HuggingFaceFolder.read(folder), Drop(fillers=True))
        new, _ = shrunk(model, 450)
        write_folder(folder / "small", new.folder.files)
        read = HuggingFaceModel(HuggingFaceFolder.read(folder / "small"))  # whose files agree
        assert read.sha256 == new.sha256
        loaded = transformers.AutoTokenizer.from_pretrained(folder / "small")
        assert len(loaded) == 450 and loaded.eos_token == "<|end_of_text|>"
        left = {token for token in sample_bpe.RESERVED if token in loaded.get_vocab()}
        assert left == {sample_bpe.RESERVED[0]}, "which pads"
        assert loaded("a b").input_ids[0] == read.bpe.pieces.index("<|begin_of_text|>")
        assert read.bpe.content["padding"]["pad_id"] == read.bpe.pieces.index(sample_bpe.RESERVED[0])


def test_tokens_that_configurations_name(tmp_path):
    """A piece that is no added token stays if it has a role; one that is dropped is a mere piece."""
    transformers = pytest.importorskip("transformers")
    described = json.loads(sample_bpe.described("gpt2"))
    token = next(token for token in described["added_tokens"] if token["content"] == "import")
    rare = max(described["model"]["vocab"], key=described["model"]["vocab"].get)
    plain = {name: value for name, value in token.items() if name != "id"}
    listed = {"additional_special_tokens": ["import"], "added_tokens_decoder": {str(token["id"]): plain}}
    folder = sample_bpe.folder("gpt2", tmp_path / "full", unk_token=rare, **listed)
    model = HuggingFaceModel(HuggingFaceFolder.read(folder), Drop(patterns=["import"]))
    new, _ = shrunk(model, 860)
    write_folder(tmp_path / "small", new.folder.files)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(loaded) == 860 and loaded.unk_token == rare and "import" in loaded.get_vocab()
    assert "import" not in loaded.get_added_vocab()
    assert rare in shrunk(model, 450)[0].bpe.pieces


def test_a_tokenizer_without_added_tokens(tmp_path, capsys):
    (tmp_path / "plain.json").write_text(changed("qwen", lambda content: content.update(added_tokens=[])))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    flags = ["--tokenizer-model", tmp_path / "plain.json", "--input", tmp_path / "in.jsonl"]
    assert tool([*flags, "--vocab-size", 400, "--output", tmp_path / "small"]) == 0
    new = HuggingFaceModel(HuggingFaceFolder.read(tmp_path / "small_hf"))
    assert len(new.bpe.pieces) == 400 and new.round_trip(TEXTS)[1] == 0
    assert "plain.json names no eos_token in a tokenizer_config.json" in capsys.readouterr().err
    folder = sample_bpe.folder("qwen", tmp_path / "full")
    assert HuggingFaceFolder.read(folder).ends_documents
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert not HuggingFaceFolder.read(folder).ends_documents


def test_counting_stops_where_the_fast_encoder_differs(tmp_path, capsys, monkeypatch):
    """The document is named, with the flag that takes the slow path."""
    monkeypatch.setattr(HuggingFaceEncoder, "__init__", wrong_encoder)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[:5]))
    flags = [
        "--tokenizer-model",
        sample_bpe.folder("qwen", tmp_path / "full"),
        "--input",
        tmp_path / "in.jsonl",
    ]
    assert tool([*flags, "--output", tmp_path / "small"]) == 1
    said = capsys.readouterr().err
    assert (
        "in.jsonl: line 3: wrong gives other ids than right" in said
        and "--tokenizer-backend tokenizers" in said
    )


def wrong_encoder(self, description, special, vocab_size, backend) -> None:
    def right(texts):
        return np.zeros(len(texts), np.int32), np.ones(len(texts), np.int32)

    def wrong(texts):
        return np.array([text == LINES[2].encode() for text in texts], np.int32), right(texts)[1]

    self.vocab_size = vocab_size
    self.encode = Checked(Encoder("wrong", wrong, Encoder("right", right)))


def test_the_tool_reports(tmp_path, capsys):
    folder = sample_bpe.folder("llama3", tmp_path / "full")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    flags = ["--tokenizer-model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "small"]
    flags += ["--vocab-size", 500, "--validation", tmp_path / "in.jsonl", "--report", tmp_path / "report"]
    assert tool([*flags, "--drop-added-tokens", "<|reserved_special_token_*|>", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    row = report["held_out"]["in"]
    assert row["round_trip_failures"] == 0 and summary["recommended"] == report["recommended"]
    assert row["tokens_after"] == summary["measured"]["tokens"] and "| 500 |" in (
        tmp_path / "report" / "report.md"
    ).read_text(encoding="utf-8")
    assert tool([*flags[:2], "--counts", tmp_path / "small.counts.npz", *flags[4:8]]) == 0
    data = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "data", *flags[:2]]
    assert tool([*data, "--tokenizer-type", "HuggingFaceTokenizer"], "preprocess_data") == 0
    of_text = Counts.load(tmp_path / "small.counts.npz")
    assert tool([*flags[:2], "--dataset", tmp_path / "data_text_document", *flags[4:6]]) == 0
    of_dataset = Counts.load(tmp_path / "small.counts.npz")
    assert np.array_equal(of_text.total, of_dataset.total)
    assert of_text.text_bytes.sum() == of_dataset.text_bytes.sum()
    assert tool([*flags[:2], "--counts", tmp_path / "in.jsonl", *flags[4:8]]) == 1


def changed(kind: str, change) -> str:
    """A kind's tokenizer.json after ``change(content)``."""
    content = json.loads(sample_bpe.described(kind))
    change(content)
    return json.dumps(content)


def clash(content: dict) -> None:
    content["added_tokens"][-1]["id"] = 5


def hole(content: dict) -> None:
    for token in content["added_tokens"]:
        token["id"] += 3


BAD = {
    "cut short": (lambda: sample_bpe.described("qwen")[:5000], "not JSON, or cut short"),
    "not JSON": (lambda: "{ tokenizer", "not JSON, or cut short"),
    "a list": (lambda: "[1, 2]", "tokenizer.json describes no model"),
    "an empty object": (lambda: "{}", "tokenizer.json describes no model"),
    "a model of nothing": (lambda: '{"model": {"type": "BPE"}}', "(there is no 'vocab')"),
    "empty": (lambda: "", "not JSON, or cut short"),
    "other JSON": (lambda: '{"a": 1}', "tokenizer.json describes no model"),
    "word piece": (lambda: '{"model": {"type": "WordPiece"}}', "its model is WordPiece; only BPE"),
    "unigram": (lambda: '{"model": {"type": "Unigram"}}', "its model is Unigram; only BPE"),
    "unknown part": (
        lambda: changed("qwen", lambda c: c["model"]["merges"].insert(7, ["qqq", "a"])),
        "merge 7 'qqq a' names 'qqq', which is no piece",
    ),
    "unknown product": (
        lambda: changed("qwen", lambda c: c["model"]["merges"].insert(7, ["q", "~"])),
        "merge 7 'q ~' names 'q~', which is no piece",
    ),
    "no pair": (lambda: changed("qwen", lambda c: c["model"]["merges"].append("a b c")), "is no pair of"),
    "clash": (lambda: changed("qwen", clash), "token '<|im_end|>' has id 5, which is that of piece '&'"),
    "hole": (lambda: changed("qwen", hole), "id 853 has no piece: a vocabulary with holes"),
    "twice": (lambda: changed("qwen", lambda c: c["model"]["vocab"].update({"a": 5})), "two pieces have id"),
    "suffix": (
        lambda: changed("qwen", lambda c: c["model"].update(end_of_word_suffix="</w>")),
        "end_of_word_suffix '</w>' is not supported",
    ),
    "neither": (
        lambda: changed("llama2", lambda c: c["model"].update(byte_fallback=False)),
        "neither byte-level nor has it byte fallback",
    ),
    "library": (
        lambda: changed("qwen", lambda c: c.update(pre_tokenizer={"type": "ByteLevel", "use_regex": 3})),
        "the library tokenizers does not read it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_a_line(name, tmp_path, capsys):
    make, says = BAD[name]
    (tmp_path / "bad.json").write_text(make(), encoding="utf-8")
    flags = ["--tokenizer-model", tmp_path / "bad.json", "--dataset", tmp_path / "none"]
    assert tool([*flags, "--vocab-size", 500, "--output", tmp_path / "small"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'bad.json'}: " in line and says in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def config_says(**config):
    return lambda folder: sample_bpe.folder("qwen", folder, **config)


def with_file(name: str, content: str):
    return lambda folder: sample_bpe.folder("qwen", folder) and (folder / name).write_text(content)


@pytest.mark.parametrize(
    "make, says",
    [
        (config_says(added_tokens_decoder={"3": {"content": "<|im_end|>"}}), "gives '<|im_end|>' id 3, tok"),
        (config_says(added_tokens_decoder={"999": {"content": "<new>"}}), "adds '<new>', which token"),
        (config_says(pad_token="<pad>"), "names '<pad>', which tokenizer.json lacks; save the"),
        (config_says(extra_special_tokens=3), "does not describe added tokens"),
        (config_says(auto_map={"AutoTokenizer": ["a.B", None]}), "names Python code (auto_map)"),
        (with_file("added_tokens.json", "{"), "added_tokens.json is not JSON, or cut short"),
        (with_file("special_tokens_map.json", "[]"), "special_tokens_map.json is not a JSON object"),
        (lambda folder: folder.mkdir(), "a folder without tokenizer.json; name its SentencePiece model"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_in_a_line(make, says, tmp_path, capsys):
    make(tmp_path / "full")
    flags = ["--tokenizer-model", tmp_path / "full", "--dataset", tmp_path / "none", "--vocab-size", 500]
    assert tool([*flags, "--output", tmp_path / "small"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_tiktoken_file_needs_to_be_explained(tmp_path, capsys):
    path = tmp_path / "tokenizer.model"  # as Llama 3 calls it
    path.write_bytes(as_tiktoken("qwen"))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    flags = ["--tokenizer-model", path, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "small"]
    flags += ["--vocab-size", 500]
    assert tool(flags) == 1 and "give --tiktoken-family (gpt2, qwen, qwen2" in capsys.readouterr().err
    explained = ["--split-pattern", FAMILIES["qwen2"].pattern, "--special-tokens", *sample_bpe.CHAT]
    assert tool([*flags, *explained, "--tiktoken-family", "gpt3"]) == 2
    said = capsys.readouterr().err
    assert "gpt3: not one of gpt2, qwen" in said and "says what --split-pattern and" in said
    assert tool([*flags, *explained]) == 0
    new = HuggingFaceModel(HuggingFaceFolder.read(tmp_path / "small_hf"))
    assert new.folder.roles == {"<|endoftext|>"} and new.bpe.pieces[-3:] == sample_bpe.CHAT
    for damaged, says in (
        (b"IQ== 0\nIg== x\n", "line 2 is not a piece"),
        (b"IQ== 0\n", "no piece for byte 0x00"),
    ):
        path.write_bytes(damaged)
        assert tool([*flags, "--tiktoken-family", "qwen2"]) == 1
        assert f"{path}: " in (said := capsys.readouterr().err) and says in said
    sample_bpe.folder("qwen", tmp_path / "full")
    assert tool(["--tokenizer-model", tmp_path / "full", *flags[2:], "--tiktoken-family", "qwen2"]) == 1
    assert "are for .tiktoken files, which" in capsys.readouterr().err


def test_a_folder_of_another_tokenizer_is_left_alone(tmp_path, capsys):
    folder = sample_bpe.folder("qwen", tmp_path / "x_hf")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    flags = ["--input", tmp_path / "in.jsonl", "--vocab-size", 500]
    before = (folder / "tokenizer.json").read_bytes()
    assert tool([*flags, "--tokenizer-model", folder, "--output", tmp_path / "x"]) == 1
    assert (
        "x_hf/tokenizer.json" in capsys.readouterr().err
        and (folder / "tokenizer.json").read_bytes() == before
    )
    (tmp_path / "y_hf").mkdir()
    (tmp_path / "y_hf" / "vocab.json").write_text("{}")
    capsys.readouterr()
    assert tool([*flags, "--tokenizer-model", folder, "--output", tmp_path / "y"]) == 1
    assert "y_hf holds another tokenizer's vocab.json; remove the folder" in capsys.readouterr().err


def test_qwen2_to_48000(shared):
    """A sample of the corpus: exactly 48,000 ids, none dead, and every text comes back."""
    full = HuggingFaceModel(HuggingFaceFolder.read(shared / "data" / "tokenizers" / "qwen2-151646"))
    texts = {}
    for name in ("train_en", "train_zh", "train_code"):
        with gzip.open(shared / "data" / "corpus" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts[name] = [json.loads(line)["text"][:4000] for line in itertools.islice(lines, 0, 600, 4)]
    train, other = (sum((part[i::2] for part in texts.values()), []) for i in (0, 1))
    counts = counted(full, train)
    vocabulary = full.vocabulary(counts[0])
    new = full.compressed(full.choose(vocabulary, counts, 48_000), counts)
    assert len(new.bpe.pieces) == 48_000 and new.unreachable() == []
    # Thai vowel signs and full-width digits: marks and numbers, which Qwen's pattern takes one by one.
    assert vocabulary.dead.sum() > 1500 and "วิ" in {
        vocabulary.texts[i] for i in np.flatnonzero(vocabulary.dead)
    }
    tokens, failed = new.round_trip(train)
    assert failed == 0 and tokens == counts.sum()
    tokens, failed = new.round_trip(other)
    assert failed == 0 and 1 < tokens / counted(full, other).sum() < 1.1


def tool(argv: list, name: str = "compress_tokenizer") -> int:
    """Run a tool; its exit code."""
    try:
        return runpy.run_path(str(TOOLS / f"{name}.py"))["main"]([str(word) for word in argv])
    except SystemExit as leaving:
        return leaving.code

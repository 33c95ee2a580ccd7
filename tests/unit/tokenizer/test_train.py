"""Training a tokenizer: what it can encode, what it refuses."""

import gzip
import json

import pytest
import sentencepiece

from megatron_ext.tokenizer.train import TrainingTextError, train_tokenizer

SETTINGS = {"key": "text", "sample_bytes": 10**6, "seed": 1}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    words = [f"def value_{i}(x):\n    return {i} * x  # 第{i}行\n" for i in range(300)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": word}) + "\n" for word in words)
    return path


def test_what_decoding_gives_back(corpus, tmp_path):
    """Everything but U+2581, as the help says."""
    model = tmp_path / "made" / "my.model"
    sample = train_tokenizer([str(corpus)], model, 320, **SETTINGS)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (sample.documents, sample.documents_used, tokenizer.vocab_size()) == (300, 300, 320)
    for text in ("x = 2024\n\n\tif  y:", "Grüße, 世界 🙂", "  led by spaces  ", "a\x00\u2028b"):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id() not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


def test_sample_is_bounded_and_repeatable(corpus, tmp_path):
    settings = SETTINGS | {"sample_bytes": 4000}
    samples = [train_tokenizer([str(corpus)], tmp_path / name, 320, **settings) for name in ("a", "b")]
    assert samples[0] == samples[1]
    assert 2000 < samples[0].text_bytes_used < 6000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bad_line_is_named_and_nothing_is_written(tmp_path):
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(TrainingTextError, match="bad.jsonl: line 2: "):
        train_tokenizer([str(corpus)], tmp_path / "my.model", 400, **SETTINGS)
    assert not (tmp_path / "my.model").exists()


def test_too_little_text_for_the_vocabulary(tmp_path):
    corpus = tmp_path / "small.jsonl"
    corpus.write_text('{"text": "short"}\n')
    with pytest.raises(TrainingTextError, match="could not make 4000 pieces"):
        train_tokenizer([str(corpus)], tmp_path / "my.model", 4000, **SETTINGS)


def test_more_characters_than_pieces(tmp_path):
    """Chinese text with a small vocabulary: half of the pieces are characters, rare ones become bytes."""
    corpus = tmp_path / "zh.jsonl"
    characters = [chr(0x4E00 + i) for i in range(2000)]
    common = "".join(characters[:40])
    lines = [common + characters[i] + characters[(7 * i) % 40] * 2 for i in range(2000)]
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    model = tmp_path / "my.model"
    train_tokenizer([str(corpus)], model, 400, **SETTINGS)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [tokenizer.id_to_piece(i) for i in range(259, tokenizer.vocab_size())]
    assert 30 < sum(len(piece) == 1 for piece in pieces) <= (400 - 259) // 2 + 1
    assert all(tokenizer.decode(tokenizer.encode(line)) == line for line in lines[::100])

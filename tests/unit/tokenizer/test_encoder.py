"""The compiled encoder gives sentencepiece's ids, id for id; what it cannot promise goes to sentencepiece."""

import gzip
import json
import logging
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_ext.tokenizer import NativeEncoder, checked
from megatron_ext.tokenizer import encoder as encoder_module
from tests.unit.tokenizer import sample_models as samples
from tests.unit.tokenizer.sample_models import BYTE, NORMAL, UNUSED, USER_DEFINED

needs_extension = pytest.mark.skipif(
    encoder_module._encoder is None, reason="megatron_ext._encoder is not built"
)
MODELS = ["internlm-103168", "llama-32000"]


@pytest.fixture(params=MODELS)
def shared_encoder(request, shared) -> NativeEncoder:
    return NativeEncoder(shared / "data" / "tokenizers" / f"{request.param}.model")


def pieces_of(encoder: NativeEncoder) -> list[str]:
    return [encoder.processor.id_to_piece(i) for i in range(encoder.vocab_size)]


def assert_same_ids(encoder: NativeEncoder, texts: list, threads: int = 1) -> None:
    for text, ids in zip(texts, encoder.encode_batch(texts, threads), strict=True):
        assert ids.tolist() == encoder.processor.encode(text), repr(text)[:200]


def check_hard_texts(encoder: NativeEncoder, number: int, seed: int) -> None:
    texts = samples.hard_texts(random.Random(seed), number, pieces_of(encoder))
    assert_same_ids(encoder, texts)


@needs_extension
def test_100000_random_strings_shared(shared_encoder):
    """40,000 for each of the two shared models, 20,000 for a trained one: 100,000."""
    assert shared_encoder.native
    check_hard_texts(shared_encoder, 40_000, 1)


@needs_extension
def test_random_strings_of_a_trained_model():
    encoder = NativeEncoder(model_proto=samples.trained())
    assert encoder.native
    check_hard_texts(encoder, 20_000, 2)


@needs_extension
def test_documents_of_the_corpus(shared_encoder, shared):
    """All validation documents and every tenth training document; every one with LONG_TESTS=1."""
    step = 1 if os.environ.get("LONG_TESTS") else 10
    for path in sorted((shared / "data" / "corpus").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        assert_same_ids(shared_encoder, texts[:: step if path.name.startswith("train") else 1], threads=2)


@needs_extension
@pytest.mark.parametrize("unit", ["a", " ", "▁", "的", "\n", "=", "\0", "\u0301", "ab", "<sep>", "\xff"])
def test_long_runs(unit):
    encoder = NativeEncoder(model_proto=samples.trained())
    assert_same_ids(encoder, [unit * n for n in (1, 2, 47, 48, 49, 50, 300, 5000)])
    assert_same_ids(encoder, ["x" + unit * 100_000 + "y"])


@needs_extension
def test_remembered_words_and_phrases(shared_encoder):
    """Letters that stay together, of every length around the caches' limits, met twice in another order."""
    rng = random.Random(11)
    words = ["".join(rng.choices("aeinot", k=45)) for _ in range(4)]
    texts = [word[:size] + last for word in words for size in range(45) for last in ("", "a", "的")]
    for _ in range(2):
        rng.shuffle(texts)
        assert_same_ids(shared_encoder, texts)


@needs_extension
def test_pieces_before_any_text(shared_encoder):
    """The encoder knows pieces from the start: only those that merging gives, and a blank for each U+2581."""
    pieces = pieces_of(shared_encoder)
    assert_same_ids(shared_encoder, [piece.removeprefix("▁") for piece in pieces])
    shared_encoder.clear_cache()
    assert_same_ids(shared_encoder, ["\n" + piece.replace("▁", " ") for piece in pieces])


@needs_extension
def test_what_is_no_ascii_anywhere(shared_encoder):
    """ASCII text is cut in blocks of 64 bytes, from its start and from what is no ASCII on."""
    line = "It's 9 o'clock, isn't it?  (No)\n" * 6
    others = ["", "é", "的", "\0", "▁", "<sep>", "x" * 70, "😀 "]
    texts = [line[:i] + other + line[i : i + 100] + other for i in range(140) for other in others]
    assert_same_ids(shared_encoder, texts)
    assert_same_ids(NativeEncoder(model_proto=samples.trained()), texts)


@needs_extension
def test_run_of_a_million(shared_encoder):
    assert_same_ids(shared_encoder, ["a" * 1_000_000, " " * 1_000_000])


@needs_extension
@pytest.mark.parametrize(
    "text",
    ["", " ", "  ", "\n", "▁", " ▁ ", b"", b"\xff", b"\xff\xfe", b"\xe4\xb8", b"a\xed\xa0\x80b",
     b"\xf4\x90\x80\x80",
     b"\xc0\x80", "\ufeffa", "a\0b", "<sep><sep> <sep", "</s><s><unk><0x41>"],
)  # fmt: skip
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_small_cases(text, extra, prefix):
    def change(proto):
        proto.normalizer_spec.remove_extra_whitespaces = extra
        proto.normalizer_spec.add_dummy_prefix = prefix

    assert_same_ids(NativeEncoder(model_proto=samples.changed(samples.trained(), change)), [text])


def _random_scores(rng, proto):
    for piece in proto.pieces:
        piece.score = rng.uniform(-10, 10)


def _coarse_scores(rng, proto):
    for piece in proto.pieces:
        piece.score = round(piece.score / 300)


def _equal_scores(rng, proto):
    for piece in proto.pieces:
        piece.score = 0.0


def _drop_half(rng, proto):
    kept = [piece for piece in proto.pieces if piece.type != NORMAL or rng.random() < 0.5]
    del proto.pieces[:]
    proto.pieces.extend(kept)


def _user_defined(rng, proto):
    for piece in proto.pieces:
        if piece.type == NORMAL and (piece.piece in ("ing", "▁", "▁t", "的") or rng.random() < 0.05):
            piece.type = USER_DEFINED


def _unused_characters(rng, proto):
    for piece in proto.pieces:
        if piece.type == NORMAL and len(piece.piece) == 1 and rng.random() < 0.3:
            piece.type = UNUSED


def _unused_pieces(rng, proto):
    for piece in proto.pieces:
        if piece.type == NORMAL and rng.random() < 0.02:
            piece.type = UNUSED


def _no_byte_fallback(rng, proto):
    proto.trainer_spec.byte_fallback = False
    kept = [
        piece for piece in proto.pieces if piece.type != BYTE and (len(piece.piece) > 1 or rng.random() < 0.7)
    ]
    del proto.pieces[:]
    proto.pieces.extend(kept)


def _blank_rules(rng, proto):
    proto.normalizer_spec.remove_extra_whitespaces = rng.random() < 0.7
    proto.normalizer_spec.add_dummy_prefix = rng.random() < 0.5
    proto.normalizer_spec.escape_whitespaces = rng.random() < 0.5
    proto.trainer_spec.treat_whitespace_as_suffix = rng.random() < 0.5


CHANGES = [_random_scores, _coarse_scores, _equal_scores, _drop_half, _user_defined, _unused_characters,
           _unused_pieces, _no_byte_fallback, _blank_rules]  # fmt: skip


@needs_extension
@pytest.mark.parametrize("seed", range(40))
def test_changed_models(seed):
    """One to three random changes of the model: refused, or the same ids."""
    rng = random.Random(seed)
    chosen = [CHANGES[seed % len(CHANGES)], *rng.sample(CHANGES, rng.randrange(3))]

    def change(proto):
        for step in chosen:
            step(rng, proto)

    try:
        encoder = NativeEncoder(model_proto=samples.changed(samples.trained(), change))
    except ValueError:
        return
    check_hard_texts(encoder, 300, seed)


@needs_extension
@pytest.mark.parametrize("seed", range(60))
def test_damaged_models(seed):
    """Bytes of the model file changed at random: an error, or the same ids."""
    rng = random.Random(seed)
    data = bytearray(samples.trained())
    if seed % 3 == 0:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randrange(1, 4) if seed % 3 else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        encoder = NativeEncoder(model_proto=bytes(data))
    except ValueError:
        return
    texts = [text for text in samples.hard_texts(rng, 50, samples.WORDS) if isinstance(text, str)]
    assert_same_ids(encoder, texts)


@needs_extension
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_charsmap_goes_through_the_normalizer(rule):
    encoder = NativeEncoder(
        model_proto=samples.trained(normalization_rule_name=rule, remove_extra_whitespaces=True)
    )
    assert encoder.native
    texts = samples.hard_texts(random.Random(3), 2000, pieces_of(encoder))
    assert_same_ids(encoder, [text for text in texts if isinstance(text, str)])


@pytest.mark.parametrize("model_type", ["unigram", "char"])
def test_other_model_types_fall_back(model_type, caplog):
    checked.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        encoder = NativeEncoder(model_proto=samples.trained(model_type, vocab_size=400))
        NativeEncoder(model_proto=samples.trained(model_type, vocab_size=400))
    assert not encoder.native
    assert len([r for r in caplog.records if "encoded by sentencepiece" in r.message]) == 1
    check_hard_texts(encoder, 200, 4)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(encoder_module, "_encoder", None)
    encoder = NativeEncoder(model_proto=samples.trained())
    assert not encoder.native
    assert "not built" in encoder.fallback_reason
    check_interface(encoder)


@needs_extension
def test_interface():
    check_interface(NativeEncoder(model_proto=samples.trained()))


def check_interface(encoder: NativeEncoder) -> None:
    texts = [*samples.corpus_lines(random.Random(5), 100), "", "再见"]
    expected = [encoder.processor.encode(text) for text in texts]
    assert encoder.encode(texts[0]).tolist() == expected[0]
    assert encoder.count(texts).tolist() == [len(ids) for ids in expected]
    for threads in (1, 2, 5):
        flat, sizes = encoder.encode_batch_into(texts, append_eod=True, num_threads=threads)
        assert flat.dtype == np.uint16 and sizes.dtype == np.int32
        assert flat.tolist() == [i for ids in expected if ids for i in [*ids, encoder.eod]]
        assert sizes.tolist() == [len(ids) + 1 if ids else 0 for ids in expected]
    assert encoder.encode_batch_into(texts, np.int32)[0].tolist() == [i for ids in expected for i in ids]
    histogram = np.zeros(encoder.vocab_size, dtype=np.int64)
    encoder.add_histogram(texts, histogram)
    assert np.array_equal(histogram, np.bincount(sum(expected, []), minlength=encoder.vocab_size))
    assert [len(part) for part in encoder.encode_batch([])] == []


@needs_extension
def test_wrong_use():
    encoder = NativeEncoder(model_proto=samples.trained())
    with pytest.raises(TypeError, match="text 1 is neither str nor bytes"):
        encoder.encode_batch(["a", 5])
    with pytest.raises(UnicodeEncodeError):
        encoder.encode("half a pair: \ud800")
    with pytest.raises(ValueError, match="uint16 or int32"):
        encoder.encode_batch_into(["a"], np.int64)
    with pytest.raises(ValueError, match="not a usable SentencePiece model"):
        NativeEncoder(model_proto=b"no model")


def test_uint16_refuses_large_vocabularies(shared):
    encoder = NativeEncoder(shared / "data" / "tokenizers" / "internlm-103168.model")
    assert encoder.encode_batch_into(["a"])[0].dtype == np.int32
    with pytest.raises(ValueError, match="do not fit uint16"):
        encoder.encode_batch_into(["a"], np.uint16)


@needs_extension
def test_several_python_threads():
    encoder = NativeEncoder(model_proto=samples.trained())
    texts = samples.hard_texts(random.Random(6), 300, pieces_of(encoder))
    expected = [encoder.processor.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as threads:
        for batch in threads.map(lambda _: encoder.encode_batch(texts, 2), range(16)):
            assert [ids.tolist() for ids in batch] == expected


@needs_extension
def test_derivations_join_to_the_piece(shared_encoder):
    pieces = pieces_of(shared_encoder)
    derivations = shared_encoder.derivations()
    joined = [
        (i, left, right) for i, (left, right) in enumerate(derivations.tolist()) if left >= 0 and right >= 0
    ]
    assert len(joined) > 0.9 * (shared_encoder.vocab_size - 8000)
    assert all(pieces[left] + pieces[right] == pieces[i] for i, left, right in joined)

"""tokenizer.json gives sentencepiece's ids on any text, or is not written."""

import random

import pytest

from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.hf_export import NotExpressible, fast_tokenizer, folder_files
from tests.unit.tokenizer import sample_models as samples

tokenizers = pytest.importorskip("tokenizers")

KINDS = {
    "plain": {"user_defined_symbols": ()},
    "user-defined": {},
    "user-defined, no blank in front": {"add_dummy_prefix": False},
    "extra blanks removed": {"remove_extra_whitespaces": True},
    "no byte fallback": {"byte_fallback": False},
}


def model(kind: str, **options) -> bytes:
    """A trained model; lists of pieces as tuples."""
    return samples.trained(kind, 450 if kind == "unigram" else 900, **options)


def require_same(data: bytes, texts: list[str]) -> None:
    """Hugging Face's ids and text are sentencepiece's."""
    encoder = NativeEncoder(model_proto=data)
    fast = tokenizers.Tokenizer.from_str(fast_tokenizer(encoder).to_str())
    fast.encode_special_tokens = True
    for text in texts:
        ids = encoder.processor.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids, text
        if encoder.processor.unk_id() not in ids:
            assert fast.decode(ids, skip_special_tokens=False) == encoder.processor.decode(ids), text


def hard(data: bytes, number: int = 300) -> list[str]:
    """Texts that the check of the export does not look at."""
    processor = NativeEncoder(model_proto=data).processor
    pieces = [processor.id_to_piece(i) for i in range(len(processor)) if not processor.is_byte(i)]
    return [t for t in samples.hard_texts(random.Random(11), number, pieces[3:]) if isinstance(t, str)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_can_be_said_is_exact(kind, options):
    data = model(kind, **options)
    require_same(data, hard(data))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("bpe", {"normalization_rule_name": "nmt_nfkc"}, r"normalizer \(nmt_nfkc\) replaces characters"),
        ("bpe", {"normalization_rule_name": "nfkc_cf"}, r"normalizer \(nfkc_cf\) replaces characters"),
        ("unigram", {"normalization_rule_name": "nmt_nfkc"}, "replaces characters"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "puts blanks behind words"),
        ("word", {"byte_fallback": False}, "neither unigram nor a BPE model"),
    ],
)
def test_what_cannot_is_refused(kind, options, reason):
    data = samples.trained(kind, 300 if kind == "word" else 900 if kind == "bpe" else 450, **options)
    with pytest.raises(NotExpressible, match=reason):
        folder_files(NativeEncoder(model_proto=data), data)


def test_blanks_that_stay():
    """Trainers refuse to make such a BPE model; a file can say it."""
    data = samples.changed(
        model("bpe"), lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False)
    )
    with pytest.raises(NotExpressible, match="leaves blanks as they are"):
        fast_tokenizer(NativeEncoder(model_proto=data))


def test_a_difference_that_nobody_thought_of_is_found(monkeypatch):
    """The check of what was written, not the list of what cannot be: a blank in front that is forgotten."""
    from megatron_ext.tokenizer import hf_export

    data = model("bpe", user_defined_symbols=())
    monkeypatch.setattr(hf_export, "_normalizer", lambda proto: tokenizers.normalizers.Replace(" ", "▁"))
    with pytest.raises(NotExpressible, match="it would encode otherwise: ' ' is"):
        fast_tokenizer(NativeEncoder(model_proto=data))


def test_equal_scores():
    """Where merges tie, sentencepiece takes the leftmost; an order of the merges says so, or nothing can."""

    def blanks(proto):  # as in Llama's model: runs of blanks, all of one score
        for length in range(2, 9):
            proto.pieces.add(piece="▁" * length, score=-3000.0, type=samples.NORMAL)

    data = samples.changed(model("bpe"), blanks)
    require_same(data, [" " * n + "a" + " " * (40 - n) + "b" for n in range(40)] + hard(data))

    def circle(proto):
        for piece in ("的一", "一的"):
            proto.pieces.add(piece=piece, score=-3000.0, type=samples.NORMAL)

    with pytest.raises(NotExpressible, match="pieces of the same score take from each other"):
        fast_tokenizer(NativeEncoder(model_proto=samples.changed(model("bpe"), circle)))


def test_merges_of_unknown_characters():
    data = samples.changed(model("bpe"), lambda proto: proto.pieces.add(piece="жж", score=-9.0, type=1))
    with pytest.raises(NotExpressible, match="'жж' joins characters that are no pieces"):
        fast_tokenizer(NativeEncoder(model_proto=data))


def test_read_by_transformers(tmp_path):
    """User-defined pieces come out whole, with no blank more than there was."""
    transformers = pytest.importorskip("transformers")
    for name, options in {"blank": {}, "none": {"add_dummy_prefix": False}}.items():
        data = model("bpe", **options)
        encoder = NativeEncoder(model_proto=data)
        (tmp_path / name).mkdir()
        for file, content in folder_files(encoder, data).items():
            (tmp_path / name / file).write_bytes(content)
        read = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in ("run <sep> the", "the<sep>", "<sep>", "<sep>the <sep>", " <UNUSED_1><sep>\n"):
            ids = encoder.processor.encode(text)
            assert read(text, add_special_tokens=False).input_ids == ids
            assert read.decode(ids) == text
        assert read("a</s>", add_special_tokens=False).input_ids[-1] == encoder.eod


@pytest.mark.parametrize("name", ["internlm-103168", "llama-32000"])
def test_tokenizers_in_use(shared, name):
    data = (shared / "data" / "tokenizers" / f"{name}.model").read_bytes()
    require_same(data, hard(data, 1000))

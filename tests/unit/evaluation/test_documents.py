"""Questions from local files, the forms they are asked in, and requests as the harness makes them."""

import json
import math

import pytest

from megatron_ext.evaluation.documents import BENCHMARKS, Document, EvaluationError, documents
from megatron_ext.evaluation.forms import Item, item_of, values_of
from megatron_ext.evaluation.requests import Encoder, Request, is_truncated, windows
from megatron_ext.tokenizer.build import NullTokenizer, SentencePieceTokenizer
from tests.helpers import benchmarks
from tests.unit.tokenizer.sample_models import trained

#: Questions of each split in the shared copies, as their README counts them.
COUNTS = {
    "cmmlu": (11582, 335), "mmlu": (3420, 285), "agieval": (1946, 0), "piqa": (1838, 0), "eprstmt": (610, 32),
    "c3": (3892, 3816),
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_questions_are_read(shared, name):
    found = [documents(name, shared / "data/eval", split) for split in ("test", "dev")]
    assert tuple(map(len, found)) == COUNTS[name]
    subjects = {document.subject for document in found[0]}
    # The first ones are of all subjects in turn.
    assert {document.subject for document in found[0][: len(subjects)]} == subjects


def test_forms():
    document = Document("x/1", "x", "谁？", ("甲", "乙丙"), 1, "他来了。")
    assert item_of(document, "letters") == Item(
        "x/1", "x", "他来了。\n问题：谁？\nA. 甲\nB. 乙丙\n答案：", (" A", " B"), 1
    )
    cloze = item_of(document, "cloze")
    assert cloze == Item("x/1", "x", "他来了。\n问题：谁？\n答案：", ("甲", "乙丙"), 1)
    assert item_of(document, "bpb") == Item("x/1", "x", cloze.query, ("乙丙",), 0)
    english = Document("y/1", "y", " Who? ", ("Ann ", "Bob"), 0, language="en")
    assert item_of(english, "cloze") == Item("y/1", "y", "Question: Who?\nAnswer:", (" Ann", " Bob"), 0)
    # -8 over 3 bytes is less likely a byte than -9 over 6.
    assert values_of(cloze, "cloze", [-8.0, -9.0]) == {
        "acc_bytes": 1.0, "bits_per_byte": 9 / math.log(2) / 6,
    }  # fmt: skip
    assert values_of(cloze, "letters", [-8.0, -9.0]) == {"acc": 0.0}


DAMAGE = {
    "cmmlu/test/anatomy.csv": (",Question,A,B,C,D,Answer\n0,q,a,b,c,d,E\n", "record 1: not a question"),
    "mmlu/test/anatomy_test.csv": ("question,choice0\nq,a\n", "record 1: .*no 'choice1'"),
    "c3/c3-d-test.json": ('[[["p"], [{"question": "q", "choice": [], "answer": "c"}], "1"]]', "question 1"),
    "piqa/dev.jsonl": ('{"goal": "g", "sol1": "a", "sol2": "b"}\n{"goal"\n', "line 2: not JSON"),
    "piqa/dev-labels.lst": ("0\n", "12 questions, but dev-labels.lst has 1 labels"),
    "eprstmt/test_public.json": ('{"sentence": "s", "label": "Good"}\n', "line 1: not a question"),
    "agieval/logiqa-en.jsonl": ("", "holds no question"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, name):
    benchmarks.write(tmp_path)
    content, said = DAMAGE[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError, match=said):
        documents(name.split("/")[0], tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(EvaluationError, match=r"not UTF-8|dev\.jsonl: "):
        documents(name.split("/")[0], tmp_path)


@pytest.mark.parametrize("label", ["", "AB", "BC"])
def test_a_label_is_one_letter(tmp_path, label):
    """None and several are no answer, though each is found within "ABCD"."""
    benchmarks.write(tmp_path)
    rows = f",Question,A,B,C,D,Answer\n0,q,a,b,c,d,{label}\n"
    (tmp_path / "cmmlu/test/anatomy.csv").write_text(rows)
    with pytest.raises(EvaluationError, match="record 1: not a question"):
        documents("cmmlu", tmp_path)
    record = {"passage": "", "question": "q", "options": ["(A)a", "(B)b", "(C)c"], "label": label}
    (tmp_path / "agieval/logiqa-en.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(EvaluationError, match="line 1: not a question"):
        documents("agieval", tmp_path)


def test_requests_as_the_harness_has_them(tmp_path):
    """Against its own code: pairs with blanks between them, and windows of a long text."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (extra eval)")
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    (tmp_path / "t.model").write_bytes(trained())
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    encoder = Encoder(tokenizer)

    class Theirs(TemplateLM):
        eot_token_id = tokenizer.eod
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.tokenize(string)

    for pair in [
        ("of the", " token"),
        ("of the  ", "token"),
        ("的一", "是在"),
        ("a\n", "b"),
    ]:
        context, continuation = Theirs()._encode_pair(*pair)
        assert encoder.pair(*pair) == Request(tuple(context), tuple(continuation)), pair
    # Where the harness leaves nothing to predict, the continuation is encoded alone.
    assert Theirs()._encode_pair("run", "ning")[1] == []
    assert encoder.pair("run", "ning").continuation == tuple(tokenizer.tokenize("ning"))
    text = "running tokens of the model " * 9
    request = encoder.rolling(text)
    for length in (7, 8, 1000):
        theirs = map(
            make_disjoint_window,
            get_rolling_token_windows(tokenizer.tokenize(text), tokenizer.eod, length, context_len=1),
        )
        wanted = [(tuple((*context, *rest)[:-1]), tuple(rest)) for context, rest in theirs]
        assert [tuple(window) for window in windows(request, length)] == wanted


def test_empty_ends():
    encoder = Encoder(NullTokenizer(99), start=[7])
    assert encoder.pair("", "3 4") == Request((7,), (3, 4)) == encoder.pair("  ", "3 4")
    assert encoder.pair("1 2", " 3") == Request((7, 1, 2), (3,))
    assert list(windows(encoder.rolling(""), 5)) == []
    assert not is_truncated(Request((1, 2), (3, 4, 5)), 4) and is_truncated(Request((1, 2, 2), (3, 4, 5)), 4)


def test_json_lines_may_hold_other_line_ends(tmp_path):
    benchmarks.write(tmp_path)
    record = {"sentence": "a\u2028b\x85c", "label": "Positive", "id": 1}
    (tmp_path / "eprstmt/test_public.json").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert documents("eprstmt", tmp_path)[0].passage == "a\u2028b\x85c"

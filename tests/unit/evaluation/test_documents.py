"""Questions from local files, the forms they are asked in, and requests as the harness makes them."""

import json
import math
import re

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


CMMLU, MMLU = "cmmlu/test/anatomy.csv", "mmlu/test/anatomy_test.csv"
C3, PIQA, LABELS = "c3/c3-d-test.json", "piqa/dev.jsonl", "piqa/dev-labels.lst"
EPRSTMT, AGIEVAL = "eprstmt/test_public.json", "agieval/logiqa-en.jsonl"
HEAD, MMLU_HEAD = ",Question,A,B,C,D,Answer\n", "question,choice0,choice1,choice2,choice3,answer\n"


def c3(passage: object = ("p",), **question: object) -> str:
    return json.dumps([[passage, [{"question": "q", "choice": ["a", "b"], "answer": "a"} | question], "1"]])


def agieval(**fields: object) -> str:
    return json.dumps({"passage": "", "question": "q", "options": ["(A)a", "(B)b"], "label": "A"} | fields)


#: (file, content, what is said behind its name).
DAMAGE = [
    (CMMLU, HEAD + "0,q,a,b,c,d,E\n", "record 1: not a question .*Answer: 'E' is none of A, B, C, D"),
    (CMMLU, HEAD + "0,q,a,b,c,d,\n", "record 1: .*Answer: empty"),
    (CMMLU, HEAD + "0,q, and more,a,b,c,d,A\n", "record 1: .*more fields than the first line"),
    (CMMLU, HEAD + "0,q,a,b,c,d\n", "record 1: .*no 'Answer'"),
    (CMMLU, HEAD + "0,q,a,a,a,a,A\n", "record 1: .*the answers are equal"),
    (CMMLU, HEAD + '0,"q,a,b,c,d,A\n', "unexpected end of data"),
    (MMLU, "question,choice0\nq,a\n", "record 1: .*no 'choice1'"),
    (MMLU, MMLU_HEAD + "q,a,b,c,d,4\n", "record 1: .*answer: '4' is none of 0, 1, 2, 3"),
    (C3, c3(choice=[]), r"passage 1: .*choice: 0 answers"),
    (C3, c3(choice="ab"), "passage 1: .*choice: a string, not a list"),
    (C3, c3(choice=["a", "b ", " b"], answer="b"), "passage 1: .*answer: 'b' is several of a, b, b"),
    (C3, c3(answer="c"), "passage 1: .*answer: 'c' is none of a, b"),
    (C3, c3(question=None), "passage 1: .*no 'question'"),
    (C3, c3(passage="the passage"), "passage 1: .*line: a string, not a list"),
    (C3, c3(passage=[]), "passage 1: .*lines of the passage: empty"),
    (C3, c3(passage=["p", 3]), "passage 1: .*line 2: a number, not a text"),
    (C3, '{"a": 1}', "an object, not a list of passages"),
    (C3, "[[1, 2]]", "passage 1: .*not .lines of the passage"),
    (C3, "[3", "not JSON"),
    (PIQA, '{"goal": "g", "sol1": "a", "sol2": "b"}\n{"goal"\n', "line 2: not JSON"),
    (PIQA, '{"goal": "g", "goal": "h"}\n', "line 1: the key 'goal' stands in one object twice"),
    (PIQA, "7\n" * 12, "line 1: .*a number, not an object"),
    (PIQA, '{"goal": "g", "sol1": "a", "sol2": "a "}\n' * 12, "line 1: .*sol: the answers are equal"),
    (LABELS, "0\n", "12 questions, but dev-labels.lst has 1 labels"),
    (LABELS, "0\n2\n", "line 2: .*label: '2' is none of 0, 1"),
    (EPRSTMT, '{"sentence": "s", "label": "Good"}\n', "line 1: .*label: 'Good' is none of Positive"),
    (EPRSTMT, '{"sentence": " ", "label": "Positive"}\n', "line 1: .*sentence: empty"),
    (EPRSTMT, '{"sentence": null, "label": "Positive"}\n', "line 1: .*no 'sentence'"),
    (EPRSTMT, '{"sentence": "\\ud800", "label": "Positive"}\n', "line 1: .*half of a surrogate pair"),
    (AGIEVAL, "", "holds no question"),
    (AGIEVAL, agieval(label=["A", "B"]), "line 1: .*label: .*several right answers"),
    (AGIEVAL, agieval(label="C"), "line 1: .*label: 'C' is none of A, B"),
    (AGIEVAL, agieval(label="AB"), "line 1: .*label: 'AB' is none of A, B"),
    (AGIEVAL, agieval(options=None), "line 1: .*no 'options'"),
    (AGIEVAL, agieval(options="(A)a(B)b"), "line 1: .*options: a string, not a list"),
    (AGIEVAL, agieval(options=["(A)", "(B)b"]), "line 1: .*options 1: empty"),
    (AGIEVAL, agieval(passage=5), "line 1: .*passage: a number, not a text"),
    (AGIEVAL, agieval(options=[f"{i}" for i in range(11)]), "line 1: .*options: 11 answers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), DAMAGE)
def test_damage_is_named(tmp_path, name, content, said):
    """File, record and field."""
    path = benchmarks.write(tmp_path) / name
    path.write_text(content)
    asked = name.split("/")[0]
    named = re.escape(str(tmp_path / PIQA if said.startswith("12 questions") else path))
    with pytest.raises(EvaluationError, match=f"^{named}: .*{said}"):
        documents(asked, tmp_path)


@pytest.mark.parametrize("name", [CMMLU, C3, PIQA, LABELS])
def test_what_is_no_text_or_not_there_is_named(tmp_path, name):
    path = benchmarks.write(tmp_path) / name
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(EvaluationError, match=f"^{re.escape(str(path))}: not UTF-8"):
        documents(name.split("/")[0], tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(EvaluationError, match=f"^{re.escape(str(path))}: Is a directory"):
        documents(name.split("/")[0], tmp_path)
    if name == LABELS:
        path.rmdir()
        with pytest.raises(EvaluationError, match=f"^{re.escape(str(path))}: No such file"):
            documents("piqa", tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    benchmarks.write(tmp_path)
    wanted = {name: documents(name, tmp_path) for name in BENCHMARKS}
    for path in tmp_path.rglob("*.*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert {name: documents(name, tmp_path) for name in BENCHMARKS} == wanted


def test_wrong_answers_may_be_equal(tmp_path):
    """As in five of the published questions."""
    path = benchmarks.write(tmp_path) / CMMLU
    path.write_text(HEAD + "0,q,a,b,b ,c,A\n")
    assert documents("cmmlu", tmp_path)[1].choices == ("a", "b", "b ", "c")


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

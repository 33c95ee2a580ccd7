"""Trainer and generator with bad files: an error of the expected kinds that names the file."""

import contextlib
import importlib
import io
import shutil
from pathlib import Path

import pytest

from megatron_ext.common import command
from tests.functional.test_run import BASE
from tests.helpers.training import flags, pretrain
from tests.unit.data import corpora
from tests.unit.tools.test_bad_input import plant

KINDS = ("missing", "folder", "empty", "noise", "deep JSON", "no JSON object", "pickle")
#: An empty or absent folder is a place to start in, or to write to.
A_START = {"load", "checkpoint args", "save below a file", "record"}
DATA = dict(mock_data=None, split="90,10,0", data_path="G/data_text_document")
TOKENIZER = dict(tokenizer_type="SentencePieceTokenizer", vocab_size=None)
#: flags of a run; BAD is the bad input, G a folder with good ones.
RUNS = {
    "tokenizer": dict(TOKENIZER, tokenizer_model="BAD"),
    "hf tokenizer": dict(TOKENIZER, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="BAD"),
    "data": dict(DATA, **TOKENIZER, tokenizer_model="G/tiny.model") | {"data_path": "BAD"},
    "data args": dict(DATA, **TOKENIZER, tokenizer_model="G/tiny.model")
    | {"data_path": None, "data_args_path": "BAD"},
    "per split": dict(DATA, **TOKENIZER, tokenizer_model="G/tiny.model")
    | {"data_path": None, "split": None, "per_split_data_args_path": "BAD"},
    "round": dict(DATA, **TOKENIZER, tokenizer_model="G/tiny.model", round_index="BAD.npy"),
    "load": dict(load="BAD"),
    "pretrained": dict(load="G/none", pretrained_checkpoint="BAD"),
    "checkpoint args": dict(load="BAD", use_checkpoint_args=True),
    "save below a file": dict(save="BAD/below", save_interval=1),
    "record": dict(
        DATA, **TOKENIZER, tokenizer_model="G/tiny.model", load="G/ck", record_sample_loss="BAD/below/x.npy"
    ),
}


@pytest.fixture(scope="module")
def good(pool, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("good")
    corpora.train_tokenizer(home)
    corpora.write_jsonl(home / "text.jsonl", corpora.documents(200))
    words = ["--input", home / "text.jsonl", "--output-prefix", home / "data", "--workers", "1"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", home / "tiny.model"]
    assert importlib.import_module("tools.preprocess_data").main([*map(str, words), "--append-eod"]) == 0
    run = BASE | {name: value for name, value in DATA.items()} | TOKENIZER
    run |= dict(tokenizer_model="G/tiny.model", train_iters=2, save="G/ck", save_interval=1)
    pretrain(pool, 1, filled(run, home, home))
    return home


def filled(run: dict, bad: Path, good: Path) -> list[str]:
    words = flags(**run)
    return [str(word).replace("BAD", str(bad)).replace("G/", f"{good}/") for word in words]


def train(argv: list[str]) -> tuple[object, str]:
    """The end of a rank: its exit code or "done", and its last message."""
    import pretrain_pangu_pro

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            pretrain_pangu_pro.main(argv)
        except SystemExit as leave:
            return leave.code, said.getvalue()
        except command.EXPECTED as error:
            return 1, command.message(error)
    return "done", said.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_bad_files(pool, good, tmp_path, name, kind):
    run = BASE | {"train_iters": 1, "eval_iters": 0} | RUNS[name]
    given = next(word for word in map(str, RUNS[name].values()) if "BAD" in word).split("/")[0]
    plant(tmp_path / given, kind)
    ((code, said),) = pool.run(1, train, filled(run, tmp_path / "BAD", good), timeout=120)
    if name in A_START and kind in ("missing", "folder"):
        assert code == "done"
    else:
        # A file of data paths that holds something else names a dataset that is not there.
        assert code in (1, 2) and ("BAD" in said or name == "data args"), (code, said[:1000])


def ask(words: list[str]) -> tuple[int, str]:
    """Exit code and error of the generator."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = importlib.import_module("tools.generate_text").main([*words, "--max-new-tokens", "2"])
    return code, said.getvalue()


def _flip(folder: Path) -> None:
    path = folder / "iter_0000002" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ckpt-step 7", "iter_0000007"),
        ("--tokenizer-model G/other.model", "another tokenizer"),
        ("--tokenizer-model G/none.model", "there is no such file"),
        ("--tokenizer-model G", "it is a folder"),
        ("--prompt long", "positions"),
        ("--device cuda", "cuda"),
        ("damaged", "was altered"),
    ],
)
def test_the_generator_says_what_is_wrong(pool, good, tmp_path, words, said):
    load = shutil.copytree(good / "ck", tmp_path / "ck")
    if words == "damaged":
        _flip(load)
        shutil.rmtree(load / "iter_0000001")
        words = ""
    other = (good / "tiny.model").read_bytes() + b"\x0a\x0a\x0a\x03new\x15\x00\x00\x80\xbf"  # one piece more
    (good / "other.model").write_bytes(other)
    line = ["--load", str(load), "--prompt", "the model", *words.replace("G", str(good)).split()]
    line = [word.replace("long", "the model " * 100) for word in line]
    ((code, err),) = pool.run(1, ask, line, timeout=120)
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith("generate_text.py: error: ") and said in last, err
    assert "Traceback" not in err


def test_the_generator_answers(pool, good):
    ((code, err),) = pool.run(1, ask, ["--load", str(good / "ck"), "--prompt", "the model"], timeout=120)
    assert code == 0 and "2 tokens" in err

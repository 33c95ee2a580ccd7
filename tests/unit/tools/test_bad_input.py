"""Every tool with every kind of bad input: one line and an exit code, no traceback.

The tools run in this process, so an exception that nobody expected fails the test by itself.
"""

import gzip
import importlib
import os
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.common import files
from tests.conftest import REPOSITORY
from tests.unit.data import corpora

MODEL_FLAGS = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
)


def run(tool: str, words: list, capsys) -> tuple[int, str, str]:
    """Exit code, standard output and error of a tool; argparse leaves by SystemExit."""
    main = importlib.import_module(f"tools.{tool}").main
    try:
        code = main([str(word) for word in words])
    except SystemExit as leave:
        code = leave.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with one valid input of each kind."""
    home = tmp_path_factory.mktemp("good")
    corpora.train_tokenizer(home)
    corpora.write_jsonl(home / "text.jsonl", corpora.documents(40))
    words = ["--input", home / "text.jsonl", "--output-prefix", home / "data", "--workers", "1"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", home / "tiny.model"]
    preprocess = importlib.import_module("tools.preprocess_data")
    assert preprocess.main([str(word) for word in [*words, "--append-eod"]]) == 0
    np.save(home / "losses.npy", np.linspace(1, 2, 50, dtype=np.float32))
    return home


def deep(levels: int = 200_000) -> bytes:
    return b"[" * levels + b"]" * levels


#: What lies where a tool looks for its input; the name of the file keeps its suffix.
CONTENTS = {
    "missing": None,
    "folder": "folder",
    "empty": b"",
    "noise": bytes(range(256)) * 20,
    "latin-1": "caf\xe9 \xff\n".encode("latin-1"),
    "words": b"not what it should be\n",
    "deep JSON": deep(),
    "long number": b'{"text": ' + b"9" * 6000 + b"}\n",
    "other JSON": b'{"iteration": [1], "lm_loss": {}, "model_type": 3, "text": 1e999}\n',
    "NaN": b'{"iteration": NaN, "lm_loss": Infinity, "text": null}\n',
    "no JSON object": b"[1, 2]\n",
    "zero bytes": bytes(5000),
    "cut gzip": gzip.compress(b'{"text": "a"}\n' * 1000)[:-20],
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


def plant(path: Path, kind: str) -> Path:
    """The bad input at ``path``."""
    content = CONTENTS[kind]
    if content == "folder":
        path.mkdir(parents=True)
    elif content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


SENTENCEPIECE = "--tokenizer-type SentencePieceTokenizer --tokenizer-model"
#: (tool, words): BAD is the bad input; G the folder of good ones, O a folder to write to.
FILES = [
    ("build_round", "--losses BAD.npy --rate 0.5 --output O/round.npy"),
    ("compress_tokenizer", "--input BAD.jsonl --tokenizer-model G/tiny.model --vocab-size 300 --output O/c"),
    ("compress_tokenizer", "--input G/text.jsonl --tokenizer-model BAD.model --vocab-size 300 --output O/c"),
    ("compress_tokenizer", "--counts BAD.npz --tokenizer-model G/tiny.model --vocab-size 300 --output O/c"),
    ("compress_tokenizer", "--dataset BAD --tokenizer-model G/tiny.model --vocab-size 300 --output O/c"),
    ("convert_checkpoint", "--from hf --to megatron --load BAD --save O/c"),
    ("convert_checkpoint", "--from megatron --to hf --load BAD --save O/c"),
    ("generate_text", "--load BAD --prompt a"),
    ("inherit_checkpoint", "--load BAD --save O/c --target-num-layers 1"),
    ("inspect_dataset", "--input BAD"),
    ("inspect_dataset", "--input G/data_text_document --tokenizer-model BAD.model"),
    ("merge_datasets", "--input BAD --output-prefix O/m"),
    ("plot_forgetting", "BAD.npy --output O/p.png"),
    ("plot_metrics", "BAD.jsonl --output O/p.png"),
    ("preprocess_data", f"--input BAD.jsonl --output-prefix O/d --workers 1 {SENTENCEPIECE} G/tiny.model"),
    ("preprocess_data", f"--input BAD.jsonl.gz --output-prefix O/d --workers 1 {SENTENCEPIECE} G/tiny.model"),
    ("preprocess_data", f"--input G/text.jsonl --output-prefix O/d --workers 1 {SENTENCEPIECE} BAD.model"),
    (
        "preprocess_data",
        "--input G/text.jsonl --output-prefix O/d --workers 1 --tokenizer-type HuggingFaceTokenizer "
        "--tokenizer-model BAD",
    ),
    (
        "retokenize_dataset",
        "--input BAD --output-prefix O/r --old-tokenizer-model G/tiny.model "
        "--new-tokenizer-model G/tiny.model",
    ),
    (
        "retokenize_dataset",
        "--input G/data_text_document --output-prefix O/r --old-tokenizer-model BAD.model "
        "--new-tokenizer-model G/tiny.model",
    ),
    ("train_tokenizer", "--input BAD.jsonl --vocab-size 300 --output O/t.model"),
    ("train_tokenizer", "--input BAD.jsonl.gz --vocab-size 300 --output O/t.model"),
]


def test_counts_that_would_unpack_without_end(good, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "_MAX_ARRAY_BYTES", 1 << 21)
    with zipfile.ZipFile(tmp_path / "BAD.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("counts.npy", "w") as record:
            record.write(bytes(3 << 20))
    words = f"--counts {tmp_path}/BAD.npz --tokenizer-model {good}/tiny.model --output {tmp_path}/c"
    code, _, err = run("compress_tokenizer", words.split(), capsys)
    assert code == 1 and "BAD.npz" in err and "would unpack to 3145728 bytes" in err


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize(("tool", "words"), FILES, ids=[f"{tool} {words[:14]}" for tool, words in FILES])
def test_bad_files(good, tmp_path, capsys, tool, words, kind):
    given = [word for word in words.split() if word.startswith("BAD")][0]
    plant(tmp_path / given, kind)
    filled = words.replace("BAD", f"{tmp_path}/BAD").replace("G/", f"{good}/").replace("O/", f"{tmp_path}/O/")
    code, _, err = run(tool, filled.split(), capsys)
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith(f"{tool}.py: error: "), (code, err)
    assert "BAD" in last or "the same file" in last, last
    assert not any((tmp_path / "O").glob("*")) or tool == "preprocess_data"


#: (tool, words): OUT is where the output should go.
OUTPUTS = [
    ("build_round", "--losses G/losses.npy --rate 0.5 --no-plot --output OUT.npy"),
    (
        "compress_tokenizer",
        "--input G/text.jsonl --tokenizer-model G/tiny.model --vocab-size 300 --output OUT",
    ),
    ("make_demo_corpus", "--max-bytes 1000 --output OUT"),
    ("merge_datasets", "--input G/data_text_document --output-prefix OUT"),
    ("plot_forgetting", "G/losses.npy --output OUT.png"),
    ("preprocess_data", f"--input G/text.jsonl --output-prefix OUT --workers 1 {SENTENCEPIECE} G/tiny.model"),
    (
        "retokenize_dataset",
        "--input G/data_text_document --output-prefix OUT --old-tokenizer-model G/tiny.model "
        "--new-tokenizer-model G/tiny.model",
    ),
    ("train_tokenizer", "--input G/text.jsonl --vocab-size 300 --output OUT.model"),
]


@pytest.mark.parametrize("wrong", ["below a file", "a folder", "full disk"])
@pytest.mark.parametrize(("tool", "words"), OUTPUTS, ids=[tool for tool, _ in OUTPUTS])
def test_outputs_that_cannot_be_written(good, tmp_path, capsys, tool, words, wrong):
    place = tmp_path / "OUT"
    if wrong == "below a file":
        (tmp_path / "file").write_text("not a folder")
        place = tmp_path / "file" / "OUT"
    elif wrong == "a folder":
        made = [place, *(Path(f"{place}{end}") for end in (".npy", ".png", ".model", ".bin", ".counts.npz"))]
        for folder in [*made, Path(f"{place}_text_document.bin")]:
            folder.mkdir()
            (folder / "kept").write_text("kept")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if wrong == "full disk":  # a file that grows beyond this is an OSError, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
        code, _, err = run(tool, words.replace("G/", f"{good}/").replace("OUT", str(place)).split(), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith(f"{tool}.py: error: "), (code, err)
    if wrong == "a folder":
        assert "OUT" in last and len(list(tmp_path.glob("*/kept"))) == len(made) + 1


#: (tool, words, flag, values): numbers that cannot be meant are bad usage (2) or bad input (1).
NUMBERS = [
    ("build_round", "--losses G/losses.npy --output O/r.npy", "--rate", "nan inf -1 0 2 x"),
    ("build_round", "--losses G/losses.npy --output O/r.npy --rate 0.5", "--seed", "-1 1.5"),
    ("build_round", "--losses G/losses.npy --output O/r.npy --rate 0.5", "--temperature", "nan inf 0 -1"),
    ("build_round", "--losses G/losses.npy --output O/r.npy --rate 0.5", "--group-size", "0 -1 9" + "9" * 20),
    ("compress_tokenizer", "--input G/text.jsonl --tokenizer-model G/tiny.model --output O/c", "--vocab-size",
     "0 -1 99999999999999999999"),
    ("compress_tokenizer", "--input G/text.jsonl --tokenizer-model G/tiny.model --output O/c", "--workers",
     "0 -1"),
    ("convert_checkpoint", "--from megatron --to hf --load G --save O/c", "--ckpt-step", "-1 9" + "9" * 30),
    ("convert_checkpoint", "--from megatron --to hf --load G --save O/c", "--max-shard-size", "0 -1 x"),
    ("describe_model", "--model-preset tiny", "--world-size", "0 -1"),
    ("describe_model", "--model-preset tiny", "--sustained-tflops", "nan -1 0"),
    ("describe_model", "--design --vocab-size 1000", "--params", "nan inf -1 0"),
    ("describe_model", "--model-preset tiny", "--num-layers", "0 -1 nan"),
    ("describe_model", "--model-preset tiny", "--hidden-size", "0 -1"),
    ("describe_model", "--model-preset tiny", "--num-attention-heads", "0 -1 7"),
    ("describe_model", "--model-preset tiny", "--tensor-model-parallel-size", "0 -1"),
    ("describe_model", "--model-preset tiny", "--vocab-size", "0 -1"),
    ("describe_model", "--model-preset tiny", "--augmented-shortcut-reduction", "0 -1"),
    ("describe_model", "--model-preset tiny", "--model-preset", "no-such"),
    ("generate_text", "--load G --prompt a", "--temperature", "nan inf -1"),
    ("generate_text", "--load G --prompt a", "--top-p", "nan 0 -1 2"),
    ("generate_text", "--load G --prompt a", "--top-k", "-1"),
    ("generate_text", "--load G --prompt a", "--seed", "-1 9" + "9" * 30),
    ("generate_text", "--load G --prompt a", "--max-new-tokens", "0 -1"),
    ("generate_text", "--load G --prompt a", "--ckpt-step", "-1 9" + "9" * 30),
    ("inherit_checkpoint", "--load G --save O/c", "--target-num-layers", "0 -1 x"),
    ("inherit_checkpoint", "--load G --save O/c --target-num-layers 1", "--seed", "-1 9" + "9" * 30),
    ("inherit_checkpoint", "--load G --save O/c --target-num-layers 1", "--seq-length", "0 -1"),
    ("inherit_checkpoint", "--load G --save O/c --target-num-layers 1", "--mask-lr", "nan inf -1"),
    ("inherit_checkpoint", "--load G --save O/c --target-num-layers 1", "--calibration-samples", "0 -1"),
    ("inspect_dataset", "--input G/data_text_document", "--samples", "-1 x"),
    ("inspect_dataset", "--input G/data_text_document --tokenizer-type NullTokenizer", "--vocab-size", "0"),
    ("launch_slurm", "--dry-run", "--gpus-per-node", "0 -1 x"),
    ("make_demo_corpus", "--output O/demo.jsonl", "--max-bytes", "0 -1"),
    ("plan_run", "--machine h100", "--world-size", "0 -1"),
    ("plan_run", "--machine h100", "--device-memory", "nan -1 0"),
    ("plan_run", "--machine h100", "--matmul-tflops", "nan -1 0"),
    ("plan_run", "--machine h100", "--link-gbytes", "nan -1 0"),
    ("plot_forgetting", "G/losses.npy --output O/p.png", "--points", "0 -1"),
    ("preprocess_data", "--input G/text.jsonl --output-prefix O/d --tokenizer-type NullTokenizer "
     "--vocab-size 9", "--workers", "0 -1 x"),
    ("preprocess_data", "--input G/text.jsonl --output-prefix O/d --tokenizer-type NullTokenizer --workers 1",
     "--vocab-size", "0 -1 9"),
    ("train_tokenizer", "--input G/text.jsonl --output O/t.model", "--vocab-size", "0 -1 259 99999999"),
    ("train_tokenizer", "--input G/text.jsonl --output O/t.model --vocab-size 300", "--sample-mb",
     "nan inf -1 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "words", "flag", "value"),
    [(tool, words, flag, value) for tool, words, flag, values in NUMBERS for value in values.split()],
    ids=lambda word: word[:20].replace(" ", "_"),
)
def test_numbers_that_cannot_be_meant(good, tmp_path, capsys, tool, words, flag, value):
    after = ["--", *MODEL_FLAGS.split()] if tool in ("plan_run", "launch_slurm") else []
    filled = words.replace("G/", f"{good}/").replace(" G ", f" {good} ").replace("O/", f"{tmp_path}/O/")
    code, out, err = run(tool, [*filled.split(), f"{flag}={value}", *after], capsys)
    assert code in (1, 2), (code, out, err)
    assert f"{tool}.py: " in err or "usage:" in err
    assert not any((tmp_path / "O").glob("*.*"))


ENDINGS = """
import os, signal, sys, time
from megatron_ext.common import command

@command.tool
def main(argv=None):
    {body}
    return 0

sys.exit(main())
"""


def ended(body: str, **more) -> subprocess.CompletedProcess:
    """A process whose tool does ``body``."""
    words = [sys.executable, "-c", ENDINGS.format(body=body)]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, **more)


def test_a_reader_that_has_gone_is_no_error():
    script = ENDINGS.format(body="for n in range(10**6): print(n)")
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 128 + signal.SIGPIPE


def test_a_broken_pipe_elsewhere_is_an_error():
    done = ended("r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    assert done.returncode == 1 and done.stderr.endswith("error: [Errno 32] Broken pipe\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_nothing_can_take():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "tools/doctor.py", "--json"]
        done = subprocess.run(words, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "doctor.py: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "words",
    [
        "merge_datasets.py --input {good}/data_text_document --output-prefix {out}/merged",
        "preprocess_data.py --input {good}/text.jsonl --output-prefix {out}/again --workers 2 "
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model {good}/tiny.model",
    ],
)
def test_standard_streams_that_are_closed(good, tmp_path, words, closed):
    """As under some daemons: the work is done, and the output is discarded."""
    line = f"{sys.executable} {REPOSITORY}/tools/{words.format(good=good, out=tmp_path)}"
    subprocess.run(["bash", "-c", f"{line} {closed}"], check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_prompt_that_nobody_can_give():
    line = f"{sys.executable} {REPOSITORY}/tools/generate_text.py --load nowhere <&-"
    left = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (left.returncode, left.stderr) == (
        1,
        "generate_text.py: error: standard input is closed; give --prompt\n",
    )


@pytest.mark.parametrize("when", ["while importing", "at work"])
def test_ctrl_c_ends_without_a_stack(when):
    sleep = "print('ready', flush=True); time.sleep(60)"
    script = ENDINGS.format(body=sleep)
    if when == "while importing":
        script = f"import time\nfrom megatron_ext.common import command\n{sleep}"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    said = process.stderr.read().decode()
    assert said == ("" if when == "while importing" else "<string>: interrupted\n")


def test_a_fault_of_the_program_keeps_its_traceback():
    done = ended("{}['a fault']")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'a fault'" in done.stderr


def test_every_tool_has_the_frame():
    for path in sorted((REPOSITORY / "tools").glob("*.py")):
        main = importlib.import_module(f"tools.{path.stem}").main
        assert hasattr(main, "__wrapped__"), f"{path.name}: main lacks @command.tool"

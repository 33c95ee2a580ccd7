"""The house keeps its shape: sizes, the place of CUDA, command lines that answer, scripts that parse."""

import argparse
import ast
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = [
    REPOSITORY / "pretrain_pangu_pro.py",
    *sorted(REPOSITORY.glob("megatron_ext/**/*.py")),
    *sorted(REPOSITORY.glob("tools/*.py")),
]
TOOLS = [path for path in PROGRAM if path.parent.name == "tools" or path.parent == REPOSITORY]
SCRIPTS = sorted({*REPOSITORY.glob("[!.]*/**/*.sh"), REPOSITORY / ".ci" / "run"})
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("docs/**/*.md")),
    *sorted(REPOSITORY.glob("examples/**/*.md")),
]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ENTRY_LINES = 350, 60, 150
CUDA_PLACES = (
    "megatron_ext/platform/",
    "megatron_ext/kernels/triton_activation.py",
    "megatron_ext/planning/machine.py",
)
#: Launchers' and other programs' flags that documents mention.
FOREIGN_FLAGS = {
    "--nproc-per-node",
    "--nnodes",
    "--ntasks",
    "--cpus-per-task",
    "--signal",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--standalone",
    *("--model", "--model_args", "--include_path", "--metadata"),  # of lm_eval
    "--max-restarts",
    "--shutdown-timeout",
    "--logdir",
    "--no-build-isolation",
}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {relative(path): ast.parse(path.read_text(encoding="utf-8")) for path in PROGRAM}


def test_files_are_small():
    lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PROGRAM}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}
    assert lines["pretrain_pangu_pro.py"] <= MAX_ENTRY_LINES


def test_functions_are_small(trees):
    lengths = {
        f"{name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_cuda_is_named_in_its_places_only(trees):
    """``torch.cuda``, ``.cuda()`` and device="cuda" in code; words in messages and flag choices are free."""
    found = []
    for name, tree in trees.items():
        if name.startswith(CUDA_PLACES):
            continue
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr == "cuda"
            device = isinstance(node, ast.keyword) and node.arg == "device"
            value = node.value.value if device and isinstance(node.value, ast.Constant) else ""
            literal = str(value).startswith("cuda")
            if attribute or literal:
                found.append(f"{name}:{node.value.lineno}")
    assert found == []


def test_modules_say_what_they_are(trees):
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


@cache
def parser_of(tool: Path) -> argparse.ArgumentParser:
    """The parser that answers ``--help``."""
    asked: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(sys, "argv", [str(tool), "--help"]),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser: asked.append(parser)),
        pytest.raises(SystemExit) as ending,
    ):
        runpy.run_path(str(tool), run_name="__main__")
    assert ending.value.code in (0, None)
    return asked[0]


@pytest.mark.parametrize("tool", TOOLS, ids=relative)
def test_help_teaches(tool):
    assert "usage:" in parser_of(tool).format_help()


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_encoder_needs_no_torch():
    """A machine that only prepares data need not pay for torch."""
    code = "import sys, megatron_ext.tokenizer.encoder as e; assert 'torch' not in sys.modules, e"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def spelled_flags() -> set[str]:
    """Every flag of the trainer, of the tools and benchmarks, and of the scripts."""
    from megatron_ext.arguments import make_parser

    parsers = [make_parser(), *map(parser_of, TOOLS)]
    flags = {name for parser in parsers for action in parser._actions for name in action.option_strings}
    for path in (*TOOLS, *REPOSITORY.glob("benchmarks/*.py")):
        flags |= set(re.findall(r"[\"'](--[a-z][\w-]+)[\"']", path.read_text(encoding="utf-8")))
    return flags | FOREIGN_FLAGS


def test_documents_name_flags_that_exist():
    known, unknown = spelled_flags(), []
    for document in DOCUMENTS:
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
            names = re.findall(r"(?<![\w-])--[a-z][\w-]+", line)
            unknown += [f"{relative(document)}:{number} {name}" for name in names if name not in known]
    assert unknown == []


def test_documents_name_files_that_exist():
    """Paths in `code` and in links; what a run makes, and placeholders in capitals, are left out."""
    missing = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        code = re.findall(
            r"(?<![\w./-])((?:megatron_ext|tools|tests|examples|benchmarks|docs)/[\w./-]*\w)", text
        )
        missing += [
            f"{relative(document)}: {name}"
            for name, folder in [*((n, document.parent) for n in links), *((n, REPOSITORY) for n in code)]
            if not (folder / name).exists() and not Path(name).stem.isupper()
        ]
    assert missing == []

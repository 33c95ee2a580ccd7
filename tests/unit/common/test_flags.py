"""Flags that are made from dataclass fields."""

import argparse
import math
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from typing import Literal

import pytest

from megatron_ext.arguments.parser import CommandLineError, read_args
from megatron_ext.common.flags import (
    Option,
    add_flags,
    add_group,
    flag,
    own_options,
    spelled,
    wrong_fields,
)
from megatron_ext.config import options

RUN = """--model-preset tiny --bf16 --mock-data --lr 1e-3 --train-iters 10 --micro-batch-size 2
    --vocab-size 99 --load somewhere --fp8-format hybrid --fp4-format e2m1"""


@dataclass
class Example:
    """Fields of every kind."""

    rate: float | None = None
    """The rate, in
    two lines."""

    quiet: bool = False
    """Say less."""

    shiny: bool = True
    """Not shiny."""

    level: Literal[0, 1] = 0
    """Level."""

    names: list[str] = flag(["a"], "--names", "--aliases")
    """100 % of the names."""


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_group(parser, "example", own_options(Example))
    return parser


def test_annotation_gives_type_and_spelling(parser):
    args = parser.parse_args("--rate 1e-3 --quiet --no-shiny --level 1 --aliases x y".split())
    assert vars(args) == {"rate": 1e-3, "quiet": True, "shiny": False, "level": 1, "names": ["x", "y"]}
    assert parser.parse_args(["--disable-shiny"]).shiny is False


def test_only_what_was_typed_is_in_the_namespace(parser):
    assert vars(parser.parse_args([])) == {}


def test_help_is_the_field_docstring_with_the_default(parser):
    text = " ".join(parser.format_help().split())
    assert "The rate, in two lines (default: none)" in text
    assert "100 % of the names (default: a)" in text


def test_choices_are_enforced(parser):
    with pytest.raises(SystemExit):
        parser.parse_args(["--level", "2"])


def test_fields_of_megatron_core_are_declared_as_there():
    """Names, defaults, types and choices; the help is ours."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    theirs = {
        field.name: field for kind in (ModelParallelConfig, TransformerConfig) for field in fields(kind)
    }
    shared = {name: option for name, option in options().items() if name in theirs}
    assert len(shared) > 50
    other = {
        name: (option.default, theirs[name].default)
        for name, option in shared.items()
        if option.default != theirs[name].default and theirs[name].default is not MISSING
    }
    # Megatron-LM's command line differs from Megatron-Core's dataclass in these.
    settled_later = {"ffn_hidden_size", "kv_channels", "transformer_impl", "attention_backend"}
    on_unless_told = {"overlap_p2p_comm", "masked_softmax_fusion", "bias_dropout_fusion", "apply_rope_fusion"}
    assert {*other} == settled_later | on_unless_told | {
        "gradient_accumulation_fusion",
        "cp_comm_type",
        "attention_softmax_in_fp32",
    }


def test_making_the_parser_imports_neither_torch_nor_megatron_core():
    program = (
        "import sys; from megatron_ext.arguments import make_parser; make_parser().format_help(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron.core', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_what_is_refused_is_understood_and_not_offered():
    kinds = Option("kind", Literal["a", "b", "c"], "a", {}, "Kind.", refused=["c"])
    parser = argparse.ArgumentParser()
    add_group(parser, "kinds", [kinds])
    assert "{a,b}" in parser.format_help() and parser.parse_args(["--kind", "c"]).kind == "c"
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "d"])


def test_each_refused_value_has_its_rule():
    """Offered or refused by a sentence that names it: none passes in silence."""
    for option in options().values():
        for value in option.refused:
            line = f"{RUN} {spelled(option)} {value}"
            with pytest.raises(CommandLineError) as refusal:
                read_args(line.split(), world_size=1, device="cuda")
            assert any(value in problem for problem in refusal.value.problems), (option.name, value)


@dataclass(kw_only=True)
class Sections:
    """What a tool's options may have beyond the trainer's."""

    load: str = flag(section="source")
    """Where from."""

    rate: float = flag(0.5, above=0, maximum=1, section="choice")
    """Share."""

    pair: list[float] = flag([0.3, 0.1], nargs=2)
    """Start and end."""


def test_fields_begin_sections_and_can_be_required(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, Sections)
    text = " ".join(parser.format_help().split())
    assert "source: --load TEXT Where from choice: --rate X Share (default: 0.5) --pair X X" in text
    assert vars(parser.parse_args(["--load", "a", "--pair", "2", "1"])) == {"load": "a", "pair": [2.0, 1.0]}
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "required: --load" in capsys.readouterr().err


def test_values_out_of_range_are_named():
    assert list(wrong_fields(Sections(load="a"))) == []
    wrong = "--rate 1.5: must be above 0 and at most 1", "--pair [0.3, inf]: must be of its type"
    assert tuple(wrong_fields(Sections(load="a", rate=1.5, pair=[0.3, math.inf]))) == wrong

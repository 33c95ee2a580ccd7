"""Flags that are made from dataclass fields."""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_ext.config.flags import (
    add_group,
    argparse_form,
    core_options,
    default_of,
    flag,
    own_options,
)


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


def test_core_fields_carry_megatrons_own_metadata():
    epsilon, bias, groups = core_options(
        "transformer.transformer_config",
        "TransformerConfig",
        ["layernorm_epsilon", "add_bias_linear", "num_query_groups"],
    )
    assert argparse_form(epsilon)[0] == ["--norm-epsilon"]
    assert argparse_form(bias)[0] == ["--disable-bias-linear"]
    assert argparse_form(bias)[1]["action"] == "store_false"
    assert default_of(groups) == 1


def test_core_fields_equal_the_imported_dataclass():
    from dataclasses import fields

    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.config import model

    declared = {field.name: field for field in fields(TransformerConfig)}
    for option in core_options(
        "transformer.transformer_config", "TransformerConfig", model.TRANSFORMER_FIELDS
    ):
        assert option.default == declared[option.name].default
        assert option.annotation == declared[option.name].type


def test_a_field_that_core_does_not_have_is_named():
    with pytest.raises(LookupError, match="no field no_such_field"):
        core_options("model_parallel_config", "ModelParallelConfig", ["no_such_field"])


def test_making_the_parser_imports_neither_torch_nor_megatron_core():
    program = (
        "import sys; from megatron_ext.arguments import make_parser; make_parser().format_help(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron.core', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

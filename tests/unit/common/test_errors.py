"""What an error of a library says, in one line."""

import pytest

from megatron_ext.common.errors import first_line
from megatron_ext.tokenizer.checked import refusals


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("\n one \ntwo"), "one"),
        (ValueError("a\u2028b"), "a"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n"), "RuntimeError"),
        (KeyError("model"), "there is no 'model'"),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize(
    "error, said",
    [
        (TypeError("no\ntext"), "it fails: TypeError: no"),
        (AssertionError(), "it fails: AssertionError"),
        (KeyError("model"), "it fails: there is no 'model'"),
        (ValueError("odd"), "it fails: odd"),
    ],
)
def test_refusals_name_the_kind_once(error, said):
    with pytest.raises(ValueError) as refused, refusals("it fails"):
        raise error
    assert str(refused.value) == said

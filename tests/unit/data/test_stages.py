"""The file of --data-stages: shares of a blend, and what is wrong with a file, by field."""

import json

import pytest

from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.stages import Source, Stage, parse, read_stages


def written(tmp_path, content) -> str:
    path = tmp_path / "stages.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_both_forms_of_a_blend(tmp_path):
    by_tokens = [{"prefix": "a", "tokens": 2e6}, {"prefix": "b", "weight": 1}]
    path = written(tmp_path, [
        {"blend": "0.7 data/a 0.3 b"},
        {"from_iteration": 5, "blend": ["1", "a", "2", "b"], "seq_length": 64},
        {"name": "end", "from_sample": 9, "blend": by_tokens},
    ])  # fmt: skip
    first, second, last = read_stages(path)
    assert first == Stage("1", (Source("data/a", 0.7), Source("b", 0.3)))
    assert second.words(10) == ["1.0", "a", "2.0", "b"]  # as they were given
    assert (last.name, last.from_sample) == ("end", 9)
    assert first.described()["blend"][0] == {"prefix": "a", "weight": 0.7, "tokens": None}


@pytest.mark.parametrize(
    ("blend", "tokens", "shares"),
    [
        ([{"prefix": "a"}], 100, [1]),
        ([{"prefix": "a", "tokens": 99.5}], 100, [1]),
        ([{"prefix": "a", "tokens": 20}, {"prefix": "b", "weight": 7}], 100, [0.2, 0.8]),
        (
            [{"prefix": "a", "weight": 3}, {"prefix": "b", "tokens": 20}, {"prefix": "c", "weight": 1}],
            100,
            [0.6, 0.2, 0.2],
        ),
        ([{"prefix": "a", "tokens": 30}, {"prefix": "b", "tokens": 70.5}], 100, [30 / 100.5, 70.5 / 100.5]),
        ([{"prefix": "a", "tokens": 100}, {"prefix": "b", "weight": 1}], 100, "leaves none for those with"),
        ([{"prefix": "a", "tokens": 30}, {"prefix": "b", "tokens": 60}], 100, "add up to 90, and the stage"),
        ([{"prefix": "a", "tokens": 30}], 100, "add up to 30, and the stage has 100"),
    ],
)  # fmt: skip
def test_tokens_of_a_source_and_the_rest_by_weight(tmp_path, blend, tokens, shares):
    (stage,) = read_stages(written(tmp_path, [{"blend": blend}]))
    if isinstance(shares, str):
        with pytest.raises(DatasetError, match=shares):
            stage.words(tokens)
    else:
        assert stage.shares(tokens) == pytest.approx(shares)
        assert len(stage.words(tokens)) == (1 if len(blend) == 1 else 2 * len(blend))


A = {"blend": "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "cannot be read"),
        ('[{"blend": "a", "blend": "b"}]', "'blend' is given twice"),
        ({"stages": [A]}, "must be a JSON list of stages"),
        ([], "must be a JSON list of stages"),
        ([A, 3], "stage 2: must be an object"),
        ([{}], "stage 1: blend: is missing"),
        ([{"blend": ""}], "stage 1: blend: must be words"),
        ([{"blend": "a b"}], "stage 1: blend: give a weight before every prefix"),
        ([{"blend": "1 a 2"}], "stage 1: blend: give a weight before every prefix"),
        ([{"blend": "1 a -2 b"}], "stage 1: blend: weights must be above 0, got -2"),
        ([{"blend": "1 a nan b"}], "stage 1: blend: weights must be above 0, got nan"),
        ([{"blend": [{"prefix": "a"}, {"prefix": "b", "weight": 1}]}], "each of several sources a weight"),
        ([{"blend": [{"weight": 1}]}], 'stage 1: blend, source 1: must be an object with a "prefix"'),
        (
            [{"blend": [{"prefix": "a", "weight": "1"}]}],
            "source 1: weight: must be a number above 0, got '1'",
        ),
        ([{"blend": [{"prefix": "a", "weight": True}]}], "source 1: weight: must be a number above 0"),
        ([{"blend": [{"prefix": "a", "tokens": 0}]}], "source 1: tokens: must be a number above 0, got 0"),
        ([{"blend": [{"prefix": "a", "tokens": 1, "weight": 1}]}], "give a weight or tokens, not both"),
        ([{"blend": [{"prefix": "a", "wieght": 1}]}], "source 1: wieght: unknown"),
        (
            [{"blend": "a", "from_iteration": 3}],
            "stage 1: from_iteration: the first stage begins with the run",
        ),
        ([A, A | {"name": "x"}], "stage 2: give either from_iteration or from_sample"),
        ([A, A | {"from_sample": 1, "from_iteration": 1}], "stage 2: give either"),
        (
            [A, A | {"from_sample": 1.5}],
            "stage 2: from_sample: must be a whole number of at least 0, got 1.5",
        ),
        ([A | {"seq_length": 0}], "stage 1: seq_length: must be a whole number of at least 1, got 0"),
        ([A | {"seqlength": 4}], "stage 1: seqlength: unknown; a stage has name, from_iteration"),
        ([A | {"name": 4}], "stage 1: name: must be text, got 4"),
        ([A | {"name": "x"}, A | {"name": "x", "from_sample": 4}], "name: two stages are called 'x'"),
    ],
)
def test_what_is_wrong_is_said_by_stage_and_field(tmp_path, content, message):
    path = written(tmp_path, content)
    stages, problems = parse(path)
    assert len(problems) == 1 and problems[0].startswith(f"--data-stages {path}: ") and message in problems[0]
    with pytest.raises(DatasetError):
        read_stages(path)


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read" in parse(str(tmp_path / "none.json"))[1][0]

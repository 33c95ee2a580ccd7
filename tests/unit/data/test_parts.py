"""Datasets that are too small: the error has numbers, and advice that works."""

import re

import pytest
from megatron.core.datasets.utils import Split

from megatron_ext.data import DatasetError, build_datasets
from megatron_ext.data.amounts import epochs, without_a_sample
from megatron_ext.data.parts import smallest_shares
from megatron_ext.data.sampler import CyclicSampler
from megatron_ext.tokenizer import build_tokenizer
from tests.unit.data import corpora
from tests.unit.data.test_datasets import arguments


def build(run, sizes=(20, 4, 4)) -> tuple:
    return build_datasets(run, build_tokenizer(run.tokenizer), sizes)


@pytest.mark.parametrize("documents", range(1, 41))
@pytest.mark.parametrize("split", ["969,30,1", "90,10,0", "0,50,50", "100,0,0"])
def test_the_split_that_is_advised_works(tmp_path, documents, split):
    """With enough documents the advice is followed once, and then every set has text."""
    prefix = str(corpora.make_dataset(tmp_path / "few", [100] * documents))
    sizes = (0 if split.startswith("0") else 20, 4, 4)
    wanted = sum(share != "0" for share in split.split(","))
    for attempt in range(2):
        try:
            built = build(arguments(data_path=[prefix], split=split), sizes)
        except DatasetError as error:
            advice = re.findall(r"--split (\d+,\d+,\d+)", str(error))[-1]
            assert f"{documents} document" in str(error) and "whole documents" in str(error)
            assert attempt == 0
            if documents < wanted:
                assert advice == "100,0,0" and "--valid-data-path" in str(error)
                return
            split = advice
        else:
            assert sum(dataset is not None for dataset in built) == wanted
            return


def test_smallest_shares():
    assert smallest_shares(3, [Split.train, Split.valid]) == "2,1,0"
    assert smallest_shares(9, list(Split)) == "7,1,1"
    assert smallest_shares(5, [Split.valid, Split.test]) == "0,4,1"


def test_every_dataset_that_is_too_small_is_named(tmp_path):
    words = [str(corpora.make_dataset(tmp_path / name, [100] * 3)) for name in "ab"]
    with pytest.raises(DatasetError) as failed:
        build(arguments(data_path=words, split="90,10,0"))
    assert f"{words[0]}: its 3 documents" in str(failed.value) and f"{words[1]}: its" in str(failed.value)


def test_documents_without_a_token(tmp_path):
    empty = str(corpora.make_dataset(tmp_path / "empty", [0, 0, 0]))
    with pytest.raises(DatasetError, match="empty: its 3 documents hold no text"):
        build(arguments(data_path=[empty], split="100,0,0"), (20, 0, 0))


def test_a_blend_takes_what_is_there_and_one_dataset_has_no_sample(tmp_path):
    words = [str(corpora.make_dataset(tmp_path / f"d{n}", [n] * 10)) for n in (100, 3)]
    with pytest.raises(DatasetError, match="d3: its train set has 30 tokens, which is no sample"):
        build(arguments(data_path=words, split="100,0,0"), (20, 0, 0))


@pytest.mark.parametrize("flag", ["data_args_path", "per_split_data_args_path"])
def test_a_file_that_names_no_data_is_not_made_up_data(tmp_path, flag):
    path = tmp_path / "named"
    path.write_text("" if flag == "data_args_path" else '{"train": null, "valid": null}')
    split = "90,10,0" if flag == "data_args_path" else None
    with pytest.raises(DatasetError, match="named: names no data"):
        build(arguments(split=split, **{flag: str(path)}))


def test_a_file_without_training_data(tmp_path):
    prefix = corpora.make_dataset(tmp_path / "text", [100] * 9)
    path = tmp_path / "parts.json"
    path.write_text(f'{{"train": null, "valid": ["{prefix}"]}}')
    run = arguments(split=None, per_split_data_args_path=str(path))
    with pytest.raises(DatasetError, match="no training data"):
        build(run)
    assert build(run, (0, 4, 4))[0] is None  # --skip-train


def test_epochs_and_weights_that_come_to_nothing(tmp_path):
    a, b, c = (str(corpora.make_dataset(tmp_path / name, [33] * 32)) for name in "abc")
    once = build(arguments(data_path=[a], split="100,0,0"), (10, 0, 0))[0]
    assert epochs(once, 10) == pytest.approx(10 / len(once)) and len(once) == 32
    often = build(arguments(data_path=[a], split="100,0,0"), (100, 0, 0))[0]
    assert epochs(often, 99) == pytest.approx(3, abs=0.1)
    blend = build(arguments(data_path=["1", a, "3", b], split="100,0,0"), (64, 0, 0))[0]
    assert epochs(blend, 64) == pytest.approx(1.5, abs=0.1)
    assert without_a_sample(blend) == without_a_sample(once) == []
    blend = build(arguments(data_path=["1e-6", a, "1", b, "1e-6", c], split="100,0,0"), (20, 0, 0))[0]
    assert without_a_sample(blend) == [c]  # the first of equals gets one


def test_a_cycle_of_nothing_ends():
    with pytest.raises(DatasetError, match="3 samples are fewer than --micro-batch-size 4"):
        next(iter(CyclicSampler(3, 0, 4, 0, 1)))

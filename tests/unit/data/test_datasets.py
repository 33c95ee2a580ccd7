"""Datasets and loaders: upstream's samples, one order for every layout, errors that name the file."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from megatron_ext.common import files
from megatron_ext.config import RunConfig
from megatron_ext.data import DatasetError, build_data_loader, build_datasets, index_cache
from megatron_ext.data.manifest import check_dataset
from megatron_ext.data.sampler import CyclicSampler, SequentialSampler
from megatron_ext.data.writer import publish, write_dataset
from megatron_ext.tokenizer import build_tokenizer
from tests.unit.data import corpora

LENGTHS = [5, 90, 33, 1, 60, 17, 120, 8, 44, 71] * 4
SIZES = (60, 8, 4)


def arguments(**changes) -> RunConfig:
    values = dict(
        split="80,15,5", seq_length=32, dataloader_type="single", num_workers=0, micro_batch_size=2,
        tokenizer_type="NullTokenizer", vocab_size=255,
    )  # fmt: skip
    return RunConfig.of(values | changes)


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Prefixes of two datasets."""
    return [str(corpora.make_dataset(tmp_path / name, LENGTHS, seed=i)) for i, name in enumerate("ab")]


def build(run, sizes=SIZES) -> tuple:
    return build_datasets(run, build_tokenizer(run.tokenizer), sizes)


def tokens(dataset, count: int = 60) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(min(count, len(dataset)))]


def upstreams(run, cache: Path, **blend) -> list:
    """The datasets of Megatron-Core's builder, as pretrain_gpt.py calls it."""
    config = GPTDatasetConfig(
        random_seed=run.init.seed, sequence_length=run.data.seq_length, num_dataset_builder_threads=1,
        path_to_cache=str(cache), tokenizer=build_tokenizer(run.tokenizer), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, **blend,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, list(SIZES), lambda: True, config).build()


@pytest.mark.parametrize("kind", ["one", "weights", "no weights", "three"])
def test_upstreams_samples(single_process, two, tmp_path, kind):
    words = {
        "one": two[:1],
        "weights": ["0.3", two[0], "0.7", two[1]],
        "no weights": two,
        "three": [two[0], two[1], two[0]],
    }[kind]
    run = arguments(data_path=words, data_cache_path=str(tmp_path / "ours"))
    theirs = upstreams(run, tmp_path / "theirs", blend=get_blend_from_list(words), split=run.data.split)
    ours = build(run)
    for mine, reference in zip(ours, theirs, strict=True):
        assert len(mine) == len(reference)
        assert tokens(mine) == tokens(reference)
    again = build(run)  # from the cache
    assert tokens(again[0]) == tokens(theirs[0])
    assert not list((tmp_path / "ours").glob(".building-*"))


def test_without_process_group(two, tmp_path):
    """A lone process, threads, the default cache beside the data."""
    run = arguments(data_path=["1", two[0], "3", two[1]], num_dataset_builder_threads=3)
    first = build(run)
    assert (Path(two[0]) / "cache" / "GPTDataset_indices").is_dir()
    assert tokens(first[0]) == tokens(build(run)[0])


def test_per_split_paths_and_files_of_arguments(single_process, two, tmp_path):
    direct = arguments(train_data_path=[two[0]], valid_data_path=["1", two[0], "2", two[1]], split=None)
    train, valid, test = build(direct)
    assert test is None
    theirs = upstreams(
        direct,
        tmp_path / "theirs",
        blend_per_split=[([two[0]], None), (two, [1.0, 2.0]), None],
    )
    assert tokens(train) == tokens(theirs[0]) and tokens(valid) == tokens(theirs[1])
    (tmp_path / "split.json").write_text(
        json.dumps({"train": [two[0]], "valid": f"1 {two[0]} 2 {two[1]}", "test": None})
    )
    per_split = arguments(per_split_data_args_path=str(tmp_path / "split.json"), split=None)
    assert tokens(build(per_split)[1]) == tokens(valid)
    (tmp_path / "blend.txt").write_text(f"0.5 {two[0]}\n0.5 {two[1]}\n")
    from_file = build(arguments(data_args_path=str(tmp_path / "blend.txt")))
    assert tokens(from_file[0]) == tokens(build(arguments(data_path=["0.5", two[0], "0.5", two[1]]))[0])


def test_mock_data_and_sizes_of_nothing(two):
    mock = build(arguments(mock_data=True))
    assert mock[0][0]["tokens"].shape == (32,)
    train, valid, test = build(arguments(data_path=two[:1], split="100,0,0"), (10, 0, 0))
    assert len(train) >= 10 and valid is None and test is None


def test_the_golden_dataset_of_megatron_lm(shared, tmp_path):
    """Its shape under the flags of the golden run: 20 iterations of 4 samples, one validation of 2."""
    prefix = shared / "reference" / "golden" / "gqa_1p" / "data" / "one_text_document"
    run = arguments(
        data_path=[str(prefix)], split="90,10,0", seq_length=64, vocab_size=256, data_cache_path=str(tmp_path)
    )
    train, valid, test = build(run, (80, 8, 8))
    assert len(train) >= 80 and len(valid) >= 8 and test is None
    assert all(int(train[i]["tokens"].max()) <= 256 for i in range(80))


# What is wrong is said, with the name of the file.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, b: os.truncate(f"{a}.bin", 900), r"a.bin: .*truncated"),
        (lambda a, b: shutil.copy(f"{b}.idx", f"{a}.idx"), r"a.bin: .* of another dataset"),
        (lambda a, b: os.truncate(f"{a}.idx", 300), r"a.idx: truncated"),
        (lambda a, b: Path(f"{a}.idx").write_bytes(b"nonsense" * 9), r"a.idx: not the index of a dataset"),
        (lambda a, b: os.remove(f"{a}.bin"), r"a.bin: there is no such file"),
        (lambda a, b: os.remove(f"{a}.idx"), r"a.idx: No such file"),
    ],
)
def test_damaged_datasets(tmp_path, damage, message):
    a = corpora.make_dataset(tmp_path / "a", LENGTHS)
    b = corpora.make_dataset(tmp_path / "b", LENGTHS[:-1] + [72])
    damage(a, b)
    with pytest.raises(DatasetError, match=message):
        build(arguments(data_path=[str(a)]))


def test_an_altered_bound_in_a_long_index_is_seen(tmp_path, monkeypatch):
    """Pieces of a long .bin and all of its index are compared: offsets can be valid and wrong."""
    monkeypatch.setattr(files, "PIECES", 2)
    monkeypatch.setattr(files, "PIECE_BYTES", 64)
    lengths = np.ones(1000, np.int32)
    prefix = tmp_path / "a"
    ids = np.arange(1000, dtype=np.uint16)
    publish(write_dataset(prefix, [ids.tobytes()], np.uint16, lengths, np.arange(0, 1001, 2)), {})
    check_dataset(prefix)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(-8 * 200, os.SEEK_END)
        bound = int.from_bytes(file.read(8), "little")
        file.seek(-8 * 200, os.SEEK_END)
        file.write((bound - 1).to_bytes(8, "little"))
    with pytest.raises(DatasetError, match=r"a.idx: was altered"):
        check_dataset(prefix)


def test_dataset_of_another_tokenizer(two, tmp_path):
    with pytest.raises(DatasetError, match=r"a.bin: holds the id 1\d\d, but the tokenizer has 101 ids"):
        build(arguments(data_path=two[:1], vocab_size=100))
    tokenizer = build_tokenizer(arguments().tokenizer)
    manifest = {"format": "megatron_ext.dataset/1", "tokenizer": {"name": "other.model", "sha256": "0" * 64}}
    Path(f"{two[0]}.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"a.bin: was made with the tokenizer other.model"):
        build(arguments(data_path=two[:1]))
    manifest["tokenizer"]["sha256"] = tokenizer.sha256
    Path(f"{two[0]}.json").write_text(json.dumps(manifest))
    build(arguments(data_path=two[:1]))


def test_parts_without_text(tmp_path):
    small = corpora.make_dataset(tmp_path / "small", [100] * 9)
    with pytest.raises(DatasetError, match=r"small: its 9 documents leave no text for the valid set"):
        build(arguments(data_path=[str(small)], split="969,30,1"))


@pytest.mark.parametrize("words", [["1", "a", "x", "b"], ["0", "a", "1", "b"], ["-1", "a", "2", "b"]])
def test_wrong_blends(words):
    with pytest.raises(DatasetError, match="weight"):
        build(arguments(data_path=words))


def test_a_half_written_cache_is_built_again(two, tmp_path):
    """Truncated files, as a killed stock Megatron leaves them, are not used as a cache."""
    run = arguments(data_path=two[:1], data_cache_path=str(tmp_path / "cache"))
    expected = tokens(build(run)[0])
    for path in (tmp_path / "cache").glob("*.npy"):
        os.truncate(path, path.stat().st_size - 4)
    assert tokens(build(run)[0]) == expected
    for path in (tmp_path / "cache").glob("*sample_index.npy"):
        np.save(path, np.array([object()]), allow_pickle=True)  # never unpickled
    assert tokens(build(run)[0]) == expected


@pytest.mark.parametrize("words", [1, 2], ids=["one", "blend"])
def test_an_altered_index_is_named_and_built_again(single_process, two, tmp_path, caplog, words):
    """A flipped bit anywhere in a used file is detected by its checksum."""
    cache = tmp_path / "cache"
    run = arguments(data_path=two[:words], data_cache_path=str(cache))
    expected = [tokens(dataset) for dataset in build(run)]
    sound = {path.name: path.read_bytes() for path in sorted(cache.iterdir())}
    assert not caplog.records
    names = [name for name in sound if name.endswith("train-sample_index.npy")]
    names += [name for name in sound if "Blended" in name and "valid" in name and name.endswith("_index.npy")]
    for name in names:
        harmed = bytearray(sound[name])
        harmed[-3] ^= 1
        (cache / name).write_bytes(harmed)
        assert [tokens(dataset) for dataset in build(run)] == expected
        assert caplog.text.count("was altered") == 1 and f"{cache / name}: was altered" in caplog.text
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == sound
        caplog.clear()
    assert len(names) == (1 if words == 1 else 4)
    build(run)
    assert not caplog.records


def test_a_lost_index_is_built_without_writing_to_the_others(two, tmp_path):
    run = arguments(data_path=two[:1], data_cache_path=str(tmp_path / "cache"))
    expected = tokens(build(run)[0])
    files = {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*train-*.npy")}
    [lost] = [path for path in files if path.name.endswith("shuffle_index.npy")]
    lost.unlink()
    assert tokens(build(run)[0]) == expected
    assert all(path.stat().st_ino != number for path, number in files.items())  # replaced, not written to


def job(cache: Path, seconds: float) -> None:
    """What a run does with a cache, with files of the names that Megatron-Core gives them."""

    def build_files(folder: Path) -> list:
        assert [
            entry for entry in folder.iterdir() if entry.name.startswith(".") and entry.is_symlink()
        ] == []
        for number in range(20):
            name = f"{number:032x}-GPTDataset-train"
            if not (folder / f"{name}-description.txt").exists():
                for kind in ("document", "sample", "shuffle"):
                    np.save(folder / f"{name}-{kind}_index.npy", np.arange(100))
                (folder / f"{name}-description.txt").write_text("x")
        return []

    time.sleep(seconds)
    index_cache.fill(cache, build_files)


def test_two_jobs_begin_at_once_on_a_new_cache(tmp_path):
    """A temporary file of one job is not treated as a file of the cache by another."""
    rng, context = random.Random(0), multiprocessing.get_context("fork")
    for number in range(15):
        cache = tmp_path / str(number)
        jobs = [context.Process(target=job, args=(cache, rng.random() * 0.06)) for _ in range(3)]
        for process in jobs:
            process.start()
        for process in jobs:
            process.join()
        assert [process.exitcode for process in jobs] == [0, 0, 0]
        assert len(list(cache.iterdir())) == 160  # 4 files and their checksums, nothing left over


def test_what_others_are_writing_is_no_file_of_the_cache(tmp_path):
    (tmp_path / ".0-GPTDataset-train-sample_index.npy.sha256.ab12").write_text("half")
    job(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 161


def test_a_build_folder_is_removed_when_its_process_is_dead(tmp_path):
    """Independent of modification times: a clock may be wrong, a build may take days."""
    old = tmp_path / ".building-old"
    old.mkdir()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(old / index_cache.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        os.utime(old, (0, 0))
        job(tmp_path, 0)
        alive = old.exists()
        holder.communicate("\n")
    assert alive
    os.utime(old, (0, 0))
    job(tmp_path, 0)
    assert not old.exists()


def test_unwritable_cache(two, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot be stored.*--data-cache-path"):
        build(arguments(data_path=two[:1], data_cache_path=str(tmp_path / "file" / "cache")))


def check_all_ranks(run) -> list[list[int]] | str:
    try:
        return tokens(build(run)[0])
    except DatasetError as error:
        return str(error)


def test_all_ranks_agree(pool, two, tmp_path):
    run = arguments(data_path=["1", two[0], "2", two[1]], data_cache_path=str(tmp_path / "cache"))
    results = pool.run(3, check_all_ranks, run)
    assert results[0] == results[1] == results[2] and len(results[0]) == 60
    os.truncate(f"{two[1]}.bin", 10)
    errors = pool.run(3, check_all_ranks, run)
    assert len(set(errors)) == 1 and "b.bin" in errors[0]


# The order of microbatches.


@pytest.mark.parametrize("sampler", [SequentialSampler, CyclicSampler])
@pytest.mark.parametrize("consumed", [0, 12])
def test_ranks_share_one_order(sampler, consumed):
    """Rank r's k-th microbatch is microbatch k * d + r of the run with one rank."""

    def stream(rank: int, ranks: int, count: int) -> list[list[int]]:
        batches = iter(sampler(101, consumed, 3, rank, ranks))
        return [next(batches) for _ in range(count)]

    alone = stream(0, 1, 28)
    for ranks in (2, 4):
        for rank in range(ranks):
            assert stream(rank, ranks, 28 // ranks) == alone[rank::ranks][: 28 // ranks]


def test_sequential_order_is_upstreams():
    """MegatronPretrainingSampler: groups of micro batch x ranks in order; an incomplete one is dropped."""
    assert list(SequentialSampler(10, 4, 2, 0, 1)) == [[4, 5], [6, 7], [8, 9]]
    assert list(SequentialSampler(11, 0, 2, 1, 2)) == [[2, 3], [6, 7]]
    assert list(SequentialSampler(10, 10, 2, 0, 1)) == []
    assert len(SequentialSampler(11, 0, 2, 1, 2)) == 2


def test_cyclic_order_is_upstreams():
    """MegatronPretrainingRandomSampler with one rank: randperm seeded with the epoch, whole microbatches."""
    batches = iter(CyclicSampler(11, 4, 2, 0, 1))
    first = torch.randperm(10, generator=torch.Generator().manual_seed(0)).view(-1, 2).tolist()
    second = torch.randperm(10, generator=torch.Generator().manual_seed(1)).view(-1, 2).tolist()
    assert [next(batches) for _ in range(8)] == first[2:] + second


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_stacks_the_samples(two, workers):
    train = build(arguments(data_path=two[:1]))[0]
    run = arguments(num_workers=workers, data_parallel_size=2, micro_batch_size=3)
    batches = list(build_data_loader(train, run, consumed_samples=6, rank=1))
    assert len(batches) == (len(train) - 6) // 6
    for k, batch in enumerate(batches):
        assert batch["tokens"].tolist() == [train[6 + k * 6 + 3 + i]["tokens"].tolist() for i in range(3)]
        assert batch["loss_mask"].shape == (3, 32)

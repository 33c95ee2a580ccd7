"""Sampling a round: exact probabilities, no index twice, errors; and the order of a round."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from megatron_ext.data.identity import require_same
from megatron_ext.data.indexed import DatasetError
from megatron_ext.data.rounds import forgetting
from megatron_ext.data.rounds import sampling as drawing
from megatron_ext.data.rounds.build_round import Groups, RoundOptions, build_round
from megatron_ext.data.rounds.dataset import NumberedDataset, Permutation, RoundDataset, read_round
from megatron_ext.data.rounds.loss_record import Losses, LossRecord, open_record, read_losses, record_paths
from megatron_ext.data.trace_sample import trace_sample
from tools import build_round as tool
from tools import plot_forgetting

LOSSES = np.array([1.2, 3.0, 0.3, 2.1, 2.2])
DRAWS = 4000
SEEDS = range(20_000, 20_000 + DRAWS)
#: Chi-square values exceeded with probability 0.01, by degrees of freedom.
CRITICAL = {3: 11.34, 4: 13.28, 9: 21.67, 255: 310.46}

IDENTITY = {
    "sources": ["a", "b"], "fingerprints": ["1", "2"], "weights": [0.5, 0.5], "documents": [0.0, 0.9],
    "seq_length": 32, "seed": 7, "tokenizer_sha256": "abc", "samples": 100, "probe": "p",
}  # fmt: skip
MODEL = {"iteration": 3, "sha256": "m"}


def drawn_places(scores: np.ndarray, count: int, seed: int) -> tuple[int, ...]:
    def chunks():
        for begin in range(0, len(scores), drawing.CHUNK):
            yield scores[begin : begin + drawing.CHUNK], None

    limits = drawing.thresholds(chunks, [count], (seed,))
    parts = [drawn for _, _, drawn in drawing.draw(chunks, limits, (seed,))]
    return tuple(np.flatnonzero(np.concatenate(parts)).tolist())


def exact_subset(scores: np.ndarray, subset: tuple[int, ...]) -> float:
    """Probability that successive draws with renormalised softmax(scores) give this subset."""
    weights, total = np.exp(scores), 0.0
    for order in itertools.permutations(subset):
        left, probability = weights.sum(), 1.0
        for place in order:
            probability *= weights[place] / left
            left -= weights[place]
        total += probability
    return total


def chi_square(counts: dict, expected: dict) -> float:
    return sum((counts.get(key, 0) - value) ** 2 / value for key, value in expected.items())


@pytest.mark.parametrize("count", [2, 3])
def test_subsets_have_their_exact_probabilities(count):
    counts = Counter(drawn_places(LOSSES, count, seed) for seed in SEEDS)
    subsets = list(itertools.combinations(range(len(LOSSES)), count))
    expected = {subset: DRAWS * exact_subset(LOSSES, subset) for subset in subsets}
    assert sum(expected.values()) == pytest.approx(DRAWS)
    assert chi_square(counts, expected) < CRITICAL[len(subsets) - 1]
    for place in range(len(LOSSES)):  # and with them each group's inclusion frequency
        chance = sum(value for subset, value in expected.items() if place in subset) / DRAWS
        found = sum(value for subset, value in counts.items() if place in subset) / DRAWS
        assert abs(found - chance) < 2.6 * math.sqrt(chance * (1 - chance) / DRAWS)


def test_first_draw_is_softmax():
    counts = Counter(drawn_places(LOSSES, 1, seed)[0] for seed in SEEDS)
    chances = np.exp(LOSSES) / np.exp(LOSSES).sum()
    expected = {place: DRAWS * chance for place, chance in enumerate(chances)}
    assert chi_square(counts, expected) < CRITICAL[4]


def test_chunks_hide_nothing(monkeypatch):
    """Over many chunks: exactly the groups with the largest keys, each once, in the expected number."""
    monkeypatch.setattr(drawing, "CHUNK", 1000)
    scores = np.random.default_rng(0).normal(3, 1, 25_500)
    keys = [drawing.gumbel_keys(scores[i : i + 1000], (5,), i // 1000) for i in range(0, len(scores), 1000)]
    best = np.argsort(-np.concatenate(keys))
    for count in (1, 777, 12_750, 25_499, 25_500):
        assert drawn_places(scores, count, 5) == tuple(sorted(best[:count].tolist()))


def test_equal_keys_are_drawn_to_the_number(monkeypatch):
    monkeypatch.setattr(drawing, "gumbel_keys", lambda scores, seed, chunk: np.round(scores))
    scores = np.array([1.0, 2.0, 2.0, 2.0, 3.0])
    assert drawn_places(scores, 3, 0) == (1, 2, 4)


def test_expected_counts_are_those_drawn():
    scores = np.random.default_rng(1).normal(2, 1, 200_000)
    limits = drawing.thresholds(lambda: [(scores, None)], [60_000], (3,))
    [(_, _, drawn)] = drawing.draw(lambda: [(scores, None)], limits, (3,))
    level = drawing.expected_level(scores, np.ones(len(scores)), 60_000)
    chance = drawing.chance_above(level, scores)
    assert drawn.sum() == 60_000 and chance.sum() == pytest.approx(60_000)
    assert limits[0].key == pytest.approx(level, abs=0.05)
    bins = np.digitize(scores, [0, 1, 2, 3, 4])
    for bin_ in range(6):
        here = bins == bin_
        spread = math.sqrt((chance[here] * (1 - chance[here])).sum())
        assert abs(drawn[here].sum() - chance[here].sum()) < 4 * spread


def recording(folder, samples=100, kind="frozen", losses=None, dataset=None):
    """A finished recording with two sources, the second in the odd places."""
    manifest = {"kind": kind, "samples": samples, "dataset": dataset or IDENTITY, "model": MODEL}
    path = folder / "losses.npy"
    record = LossRecord(path, open_record(path, manifest, np.arange(samples) % 2))
    values = np.random.default_rng(2).normal(3, 1, samples) if losses is None else losses
    record.write(np.arange(samples), values, np.arange(samples) % 5 + 1)
    record.mark(samples, force=True)
    return path


def test_build_round(tmp_path):
    path = recording(tmp_path)
    manifest, report = build_round(path, RoundOptions(rate=0.5, group_size=8, seed=3), tmp_path / "round")
    index = read_round(tmp_path / "round.npy")
    assert index.manifest == json.loads(json.dumps(manifest))
    ids = np.asarray(index.ids)
    assert (np.diff(ids) > 0).all() and len(ids) == manifest["selected"]
    groups = np.unique(ids // 8)
    assert len(groups) == manifest["groups_drawn"] == round(0.5 * 13)  # the last of 13 has 4 samples
    assert np.isin(np.arange(100), ids).tolist() == np.isin(np.arange(100) // 8, groups).tolist()
    assert report.groups.sum() == 13 and report.kept.sum() == len(groups)
    assert report.expected.sum() == pytest.approx(len(groups), rel=0.01)
    assert report.source_before.tolist() == [50, 50] and report.source_after.sum() == len(ids)
    assert manifest["dataset"] == IDENTITY and manifest["losses"]["model"] == MODEL
    again, _ = build_round(path, RoundOptions(rate=0.5, group_size=8, seed=3), tmp_path / "again")
    other, _ = build_round(
        path, RoundOptions(rate=0.5, group_size=8, seed=3, rounds_seen=2), tmp_path / "other"
    )
    assert again["sha256"] == manifest["sha256"] != other["sha256"]
    assert other["round"] == 3


def test_group_loss_is_the_batchs():
    losses, tokens = np.array([1, 2, 3, 4, 9], np.float32), np.array([1, 3, 2, 2, 7], np.int32)
    groups = Groups(Losses("x", losses, tokens, None, None), 2)
    assert np.concatenate(list(groups.losses())).tolist() == [7 / 4, 14 / 4, 9]
    plain = Groups(Losses("x", losses, None, None, None), 2)
    assert np.concatenate(list(plain.losses())).tolist() == [1.5, 3.5, 9]


def test_per_source_keeps_the_shares(tmp_path):
    skewed = np.where(np.arange(100) % 2, 9.0, 1.0)
    path = recording(tmp_path, losses=skewed)
    _, free = build_round(path, RoundOptions(rate=0.4), tmp_path / "free")
    _, kept = build_round(path, RoundOptions(rate=0.4, per_source=True), tmp_path / "kept")
    assert free.source_after[1] > 35
    assert kept.source_after.tolist() == [20, 20]
    assert kept.source_expected == pytest.approx([20, 20], rel=0.01)


def test_rate_one_is_everything(tmp_path):
    options = RoundOptions(rate=1.0, group_size=7)
    manifest, report = build_round(recording(tmp_path), options, tmp_path / "round")
    assert read_round(tmp_path / "round").ids.tolist() == list(range(100))
    assert manifest["selected"] == 100
    assert report.expected.tolist() == report.kept.tolist() == report.groups.tolist()


def test_plain_losses(tmp_path, capsys):
    np.save(tmp_path / "plain.npy", np.random.default_rng(0).normal(3, 1, 1000).astype(np.float32))
    flags = ["--losses", tmp_path / "plain.npy", "--rate", "0.25", "--output", tmp_path / "out" / "round.npy"]
    assert tool.main([*map(str, flags)]) == 0
    assert "no manifest: not checked" in capsys.readouterr().out
    assert (tmp_path / "out" / "round.png").stat().st_size > 1000
    assert tool.main([*map(str, flags), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["selected"] == 250 and told["dataset"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rate", "0"], "--rate"), (["--rate", "1.5"], "--rate"), (["--rate", "nan"], "--rate"),
     (["--rate", "0.5", "--temperature", "0", "--group-size", "0"], "--group-size 0.*--temperature 0")],
)  # fmt: skip
def test_bad_usage(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as left:
        tool.main(["--losses", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y"), *words])
    assert left.value.code == 2
    assert pytest.importorskip("re").search(message, capsys.readouterr().err)


def test_a_rounds_manifest_takes_no_datasets_place(tmp_path, capsys):
    """``--output data/my.npy`` writes data/my.json, which may be a dataset's."""
    path, manifest = recording(tmp_path), tmp_path / "my.json"
    manifest.write_text('{"format": "megatron_ext.dataset/1"}')
    flags = ["--losses", str(path), "--rate", "0.5", "--output", str(tmp_path / "my.npy")]
    assert tool.main(flags) == 1
    assert "my.json: is no manifest of megatron_ext.round/1" in capsys.readouterr().err
    assert (
        manifest.read_text() == '{"format": "megatron_ext.dataset/1"}' and not (tmp_path / "my.npy").exists()
    )


def refused(tmp_path, path, capsys, *words) -> str:
    flags = ["--losses", str(path), "--rate", "0.5", "--output", str(tmp_path / "round.npy"), *words]
    assert tool.main(flags) == 1
    assert not (tmp_path / "round.json").exists()
    return capsys.readouterr().err


def test_bad_losses_are_counted_and_named(tmp_path, capsys):
    losses = np.ones(100)
    losses[[4, 17]], losses[60:] = np.nan, np.inf
    message = refused(tmp_path, recording(tmp_path, losses=losses), capsys)
    assert "42 of 100 losses are NaN or Inf" in message and "samples 4, 17, 60, 61" in message


def test_incomplete_recording_is_refused(tmp_path, capsys):
    path = tmp_path / "losses.npy"
    manifest = {"kind": "frozen", "samples": 10, "dataset": IDENTITY, "model": MODEL}
    record = LossRecord(path, open_record(path, manifest, np.zeros(10)))
    record.write(np.arange(4), np.ones(4), np.ones(4))
    record.mark(4, force=True)
    assert "not complete, 4 of 10 samples" in refused(tmp_path, path, capsys)


def test_what_is_no_loss_file_is_refused(tmp_path, capsys):
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "ints.npy", np.arange(5))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    for name in ("text", "ints", "object", "absent"):
        assert f"{name}.npy" in refused(tmp_path, tmp_path / f"{name}.npy", capsys)
    path = recording(tmp_path)
    np.save(record_paths(path).tokens, np.zeros(7, np.int32))
    assert "losses.tokens.npy: holds 7 samples" in refused(tmp_path, path, capsys)


def test_recording_goes_on_only_with_the_same(tmp_path):
    path = recording(tmp_path, samples=10, dataset=IDENTITY)
    same = {"kind": "frozen", "samples": 10, "dataset": IDENTITY, "model": MODEL}
    assert open_record(path, same, None)["recorded"] == 10
    others = {
        "frozen losses, not online": same | {"kind": "online"},
        "--seq-length: 32 there, 64 here": same | {"dataset": IDENTITY | {"seq_length": 64}},
        r"another model or other options \(sha256\)": same | {"model": MODEL | {"sha256": "n"}},
    }
    for message, manifest in others.items():
        with pytest.raises(DatasetError, match=message):
            open_record(path, manifest, None)
    assert read_losses(path).manifest["mean_loss"] is not None
    np.save(tmp_path / "mine.npy", np.zeros(3, np.float32))
    with pytest.raises(DatasetError, match="has no manifest"):
        open_record(tmp_path / "mine.npy", same, None)


def test_every_difference_is_named():
    other = IDENTITY | {"seq_length": 64, "seed": 8, "documents": [0.0, 0.5], "fingerprints": ["1", "3"]}
    with pytest.raises(DatasetError) as refused:
        require_same(other, IDENTITY, "round2.npy", "Build another.")
    for flag in ("--seq-length: 64 there, 32 here", "--seed", "--split", "--data-path"):
        assert flag in str(refused.value)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutation_is_one(size):
    orders = [list(Permutation(size, (11, epoch))) for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 16 or len({tuple(order) for order in orders}) == 3


def test_permutation_is_even():
    """Every position is equally likely; neighbours do not stay neighbours."""
    counts = Counter(Permutation(256, (seed,))(17) for seed in range(8192))
    assert chi_square(counts, {place: 32.0 for place in range(256)}) < CRITICAL[255]
    order = np.array(list(Permutation(10_000, (1, 2))))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert Permutation(10**10, (1,))(0) < 10**10


class Letters:
    def __len__(self):
        return 10

    def __getitem__(self, number):
        return {"tokens": chr(97 + number)}


def test_round_dataset(tmp_path):
    np.save(tmp_path / "plain.npy", np.ones(10, np.float32))
    build_round(tmp_path / "plain.npy", RoundOptions(rate=0.4), tmp_path / "round")
    index = read_round(tmp_path / "round")
    dataset = RoundDataset(Letters(), index, samples=9, seed=1)
    assert len(dataset) == 12
    ids = [dataset[place]["sample_id"] for place in range(12)]
    for epoch in range(3):
        assert sorted(ids[4 * epoch : 4 * epoch + 4]) == index.ids.tolist()
    assert dataset[5] == {"tokens": chr(97 + ids[5]), "sample_id": ids[5]}
    again = RoundDataset(Letters(), index, samples=100, seed=1)
    assert [again.sample_id(place) for place in range(12)] == ids
    build_round(tmp_path / "plain.npy", RoundOptions(rate=0.4, order="training"), tmp_path / "round")
    dataset = RoundDataset(Letters(), read_round(tmp_path / "round"), samples=8, seed=1)
    assert [dataset.sample_id(place) for place in range(8)] == index.ids.tolist() * 2
    assert NumberedDataset(Letters())[3] == {"tokens": "d", "sample_id": 3}


def test_provenance_looks_through_a_round(tmp_path):
    np.save(tmp_path / "plain.npy", np.ones(10, np.float32))
    build_round(tmp_path / "plain.npy", RoundOptions(rate=0.4), tmp_path / "round")
    dataset = RoundDataset(Letters(), read_round(tmp_path / "round"), samples=8, seed=1)
    assert trace_sample(dataset, 6) == {"number": dataset[6]["sample_id"]}


def test_index_without_its_manifest_is_refused(tmp_path):
    np.save(tmp_path / "mine.npy", np.arange(5))
    with pytest.raises(DatasetError, match="has no manifest mine.json"):
        read_round(tmp_path / "mine.npy")
    build_round(recording(tmp_path), RoundOptions(rate=0.5), tmp_path / "round")
    np.save(tmp_path / "round.npy", np.arange(7))
    with pytest.raises(DatasetError, match="holds 7 samples, but round.json says 50"):
        read_round(tmp_path / "round.npy")


def flip(path, place: int, bit: int) -> None:
    """Flip one bit of the number at ``place`` of an .npy file."""
    numbers = np.load(path)
    numbers.view(f"u{numbers.itemsize}")[place] ^= 1 << bit
    np.save(path, numbers)


@pytest.mark.parametrize("bit", [0, 1, 40, 63])
def test_a_flipped_bit_in_an_index_is_seen(tmp_path, bit):
    """Also a bit that preserves the order and the ends: it would train on another sample."""
    np.save(tmp_path / "plain.npy", np.ones(4000, np.float32))
    build_round(tmp_path / "plain.npy", RoundOptions(rate=0.01), tmp_path / "round")
    read_round(tmp_path / "round")
    flip(tmp_path / "round.npy", 20, bit)
    with pytest.raises(DatasetError, match=r"round.npy: .*build the round again"):
        read_round(tmp_path / "round")


def test_an_index_beside_the_manifest_of_another_is_seen(tmp_path):
    np.save(tmp_path / "plain.npy", np.ones(100, np.float32))
    for seed in (1, 2):
        build_round(tmp_path / "plain.npy", RoundOptions(rate=0.5, seed=seed), tmp_path / f"round{seed}")
    (tmp_path / "round2.npy").replace(tmp_path / "round1.npy")
    with pytest.raises(DatasetError, match=r"not those that round1.json was written for"):
        read_round(tmp_path / "round1")
    manifest = json.loads((tmp_path / "round2.json").read_text()) | {"order": "shuffmed"}
    (tmp_path / "round2.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="its order is 'shuffmed'"):
        read_round(tmp_path / "round2")


@pytest.mark.parametrize("name", ["losses", "tokens", "sources"])
def test_a_flipped_bit_in_a_recording_is_seen(tmp_path, name):
    path = recording(tmp_path)
    read_losses(path)
    harmed = getattr(record_paths(path), name)
    flip(harmed, 33, 0)
    with pytest.raises(DatasetError, match=f"{harmed.name}: was altered since it was recorded"):
        read_losses(path)


def test_a_recording_that_is_written_to_again_is_sealed_again(tmp_path):
    """The second epoch of a round: a recording that was killed between two marks is not refused."""
    path = recording(tmp_path)
    same = {"kind": "frozen", "samples": 100, "dataset": IDENTITY, "model": MODEL}
    record = LossRecord(path, open_record(path, same, None))
    record.write(np.array([3]), np.array([9.0]), np.array([2]))
    record.losses.flush()
    assert read_losses(path).losses[3] == 9.0
    record.mark(force=True)
    assert "sha256" in read_losses(path).manifest
    flip(path, 3, 0)
    with pytest.raises(DatasetError, match="was altered"):
        read_losses(path)


def test_forgetting_curve(tmp_path, capsys):
    """Means over intervals, weighted by tokens; values that are not finite are ignored."""
    losses = np.linspace(5, 3, 100)
    losses[99] = np.nan
    found = forgetting.curve(read_losses(recording(tmp_path, losses=losses)), 10)
    weights = np.arange(100) % 5 + 1
    first = (losses[:10] * weights[:10]).sum() / weights[:10].sum()
    last = (losses[90:99] * weights[90:99]).sum() / weights[90:99].sum()
    assert found.ends() == pytest.approx((first, last), abs=1e-6)
    assert found.place[:2].tolist() == [5, 15]
    assert found.error[0] == pytest.approx(np.std(losses[:10]) / 10**0.5, rel=1e-3)
    assert (
        plot_forgetting.main([str(tmp_path / "losses"), "--output", str(tmp_path / "f.png"), "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)["losses"]
    assert next(iter(told.values()))["first_tenth"] > 4.7
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert plot_forgetting.main([str(tmp_path / "absent"), "--output", str(tmp_path / "g.png")]) == 1

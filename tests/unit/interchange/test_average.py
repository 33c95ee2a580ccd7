"""The mean of checkpoints, and what is refused."""

import runpy
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import folders
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from tests.unit.inherit import toy

TOOL = Path(__file__).resolve().parents[3] / "tools" / "average_checkpoints.py"
MODEL = toy.config()


def tool(*words: object) -> int:
    """Run the tool; its exit code."""
    try:
        return runpy.run_path(str(TOOL))["main"]([*map(str, words)])
    except SystemExit as leaving:
        return leaving.code


def written(folder: Path, seed: int, model=MODEL, iteration: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that was written to ``folder``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.without_padding.parameters()
    values = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
    write_checkpoint(folder, model, torch.float32, values.__getitem__, iteration=iteration)
    return values


def run_of(folder: Path, iterations: list[int]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each checkpoint of a run."""
    values = []
    for number in iterations:
        values.append(written(folder / f"part{number}", number, iteration=number))
        (folder / f"part{number}" / f"iter_{number:07d}").rename(folders.checkpoint_dir(folder, number))
    (folder / folders.TRACKER).write_text(str(iterations[-1]))
    return values


def assert_is(folder: Path, parts: list[dict[str, torch.Tensor]], weights: list[float]) -> None:
    source = open_source(folder)
    assert source.model == MODEL and source.iteration == 0
    for key in source.keys():
        expected = sum(part[key].double() * weight for part, weight in zip(parts, weights, strict=True))
        assert torch.equal(source.get(key), expected.float()), key


def test_the_mean_of_a_runs_last_checkpoints(tmp_path, capsys):
    parts = run_of(tmp_path / "run", [10, 20, 30, 40])
    assert tool("--load", tmp_path / "run", "--last", 2, "--save", tmp_path / "mean") == 0
    assert_is(tmp_path / "mean", [parts[3], parts[2]], [0.5, 0.5])
    assert "iteration 40" in capsys.readouterr().out


def test_weights_belong_to_the_checkpoints_in_order(tmp_path):
    parts = run_of(tmp_path / "run", [10, 20])
    other = written(tmp_path / "other", 7)
    words = "--ckpt-step", 10, 20, "--weights", 1, 3
    assert tool("--load", tmp_path / "run", *words, "--save", tmp_path / "mean") == 0
    assert_is(tmp_path / "mean", parts, [0.25, 0.75])
    single = tmp_path / "run" / "iter_0000010"
    words = "--weights", 2, "-1", "--save", tmp_path / "extrapolated"
    assert tool("--load", single, tmp_path / "other", *words) == 0
    assert_is(tmp_path / "extrapolated", [parts[0], other], [2.0, -1.0])


def test_one_checkpoint_is_its_own_mean(tmp_path):
    values = written(tmp_path / "one", 1)
    assert tool("--load", tmp_path / "one", "--save", tmp_path / "mean") == 0
    assert_is(tmp_path / "mean", [values], [1.0])


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--load", "run", "--last", "3"], 1, "--last 3: {}/run holds 2 checkpoints"),
        (["--load", "run", "--ckpt-step", "5"], 1, "there is no {}/run/iter_0000005; it has [10, 20]"),
        (["--load", "run", "one", "--last", "2"], 2, "choose from one run, --load names 2"),
        (["--load", "run", "--last", "2", "--ckpt-step", "10"], 2, "both say which checkpoints: give one"),
        (["--load", "run", "one", "--weights", "1"], 1, "--weights names 1 weights for 2 checkpoints"),
        (["--load", "run", "one", "--weights", "1", "-1"], 2, "with a sum above 0"),
        (["--load", "run", "wide"], 1, "are different models: ffn_hidden_size 48 and 64"),
        (["--load", "run", "one", "run/iter_0000020"], 1, "{}/run/iter_0000020 is named twice"),
        (["--load", "run", "--ckpt-step", "10", "10"], 1, "iter_0000010 is named twice; --weights lets"),
        (["--load", "run", "none"], 1, "--load none: there is no such folder"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, words, code, message):
    run_of(tmp_path / "run", [10, 20])
    written(tmp_path / "one", 1)
    written(tmp_path / "wide", 1, toy.config(ffn_hidden_size=64))
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words]
    assert tool(*words, "--save", tmp_path / "mean") == code
    assert message.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()

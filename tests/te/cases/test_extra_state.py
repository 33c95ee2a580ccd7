"""FP8's state in a checkpoint reaches Transformer Engine without what else its bytes ask for."""

import io
import os
import pickle

import pytest
import torch
import transformer_engine.pytorch as te
from transformer_engine.common import recipe

from megatron_ext.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from megatron_ext.checkpoint.extra_state import without_code
from tests.helpers.parallel import Layout
from tests.te.cases.machines import run

RECIPES = [
    recipe.DelayedScaling(amax_history_len=8),
    recipe.Float8CurrentScaling(),
    recipe.MXFP8BlockScaling(),
]


def as_bytes(state: object) -> torch.Tensor:
    """What ``get_extra_state`` makes of a state."""
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def honest(made: recipe.Recipe) -> dict:
    """The state of a linear layer in FP8 (transformer_engine/pytorch/module/base.py, get_extra_state)."""
    state = {"recipe": made, "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True, "name": "scale"}}
    if made.delayed():
        state |= {"scale_fwd": torch.rand(3), "amax_history_fwd": torch.rand(8, 3)}
    return state


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class EvilStorage:
    """Hides the same in the bytes of a tensor's storage."""

    def __init__(self, folder):
        file = io.BytesIO()
        torch.save(Evil(folder), file)
        self.data = file.getvalue()

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("made", RECIPES, ids=lambda made: type(made).__name__)
def test_an_honest_state_passes(made):
    state = honest(made)
    found = pickle.loads(without_code("key", as_bytes(state)).numpy().tobytes())
    assert found.keys() == state.keys() and found["extra_fp8_variables"] == state["extra_fp8_variables"]
    assert type(found["recipe"]) is type(made) and vars(found["recipe"]) == vars(made)
    assert all(torch.equal(found[key], state[key]) for key in state if isinstance(state[key], torch.Tensor))


@pytest.mark.parametrize("wrap", [Evil, EvilStorage])
@pytest.mark.parametrize("place", ["scale_fwd", "recipe"])
def test_what_runs_code_is_refused(tmp_path, wrap, place):
    ran = tmp_path / "ran"
    data = as_bytes(honest(recipe.DelayedScaling()) | {place: wrap(ran)})
    with pytest.raises(CheckpointError, match="decoder.key cannot be read safely"):
        without_code("decoder.key", data)
    assert not ran.exists()
    with pytest.raises(Exception, match="."):  # the module itself runs it, and then stumbles over what came
        te.Linear(16, 16, device="cpu").set_extra_state(data)
    assert ran.exists() or wrap is EvilStorage


def test_no_other_kinds_of_state():
    assert without_code("key", [None, torch.empty(0, dtype=torch.uint8)])[0] is None
    old = io.BytesIO()
    torch.save({"scale_fwd": torch.ones(3)}, old)
    old.seek(0)
    (found,) = without_code("key", [old])
    assert torch.equal(pickle.loads(found.numpy().tobytes())["scale_fwd"], torch.ones(3))
    with pytest.raises(CheckpointError, match="key holds a dict"):
        without_code("key", {"scale_fwd": 1})


def foreign_checkpoint(folder: str) -> tuple[str, bool]:
    """Save with an evil state in one layer and load: the error, and whether the code ran."""
    ran = f"{folder}/ran"
    first = run(Layout(), True)
    layer = next(m for m in first.model[0].modules() if isinstance(m, te.Linear))
    layer.get_extra_state = lambda: as_bytes({"scale_fwd": Evil(ran)})
    save_checkpoint(folder, 1, run_state=first.run_state, **first.parts).finish()
    try:
        load_checkpoint(folder, **run(Layout(), True).parts)
    except CheckpointError as error:
        return str(error), os.path.exists(ran)
    return "", os.path.exists(ran)


def test_a_foreign_checkpoint_runs_nothing(pool, tmp_path):
    ((error, ran),) = pool.run(Layout(), foreign_checkpoint, str(tmp_path))
    assert "os.mkdir" in error or "posix.mkdir" in error
    assert not ran

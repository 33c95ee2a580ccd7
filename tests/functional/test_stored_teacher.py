"""Targets as users store and learn them: recorded at every layout, killed, trained on, refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest

from megatron_ext.data.teacher_store import TargetPaths, TargetStore
from tests.conftest import REPOSITORY
from tests.functional.test_rounds import LAYOUTS, MODEL, TRAINING, build
from tests.functional.test_rounds import record as record_losses
from tests.helpers.pool import WorkerError
from tests.helpers.teachers import TEACHER, of_two_vocabularies
from tests.helpers.training import _pretrain, flags, pretrain
from tests.unit.data import corpora

SAMPLES = 44  # no multiple of any layout's microbatches
WHOLE = dict(distillation_top_k=256, teacher_logits_dtype="fp32")


def steps(records: list[dict]) -> list[tuple[float, float, float]]:
    """Cross entropy, divergence and gradient norm of every iteration."""
    found = [record for record in records if "split" not in record]
    return [(r["lm_loss"], r["distillation_loss"], r["grad_norm"]) for r in found]


def require_equal(found: list[tuple], expected: list[tuple], within: float = 1e-6) -> None:
    """The first step ``within``; the optimizer makes more of its rounding in those that follow."""
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=within)
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=20 * within, abs=within)


@pytest.fixture(scope="module")
def home(pool, tmp_path_factory):
    """A folder with a blend of two datasets, a teacher that was trained on it, and its targets in full."""
    path = tmp_path_factory.mktemp("stored")
    data = MODEL | TRAINING | dict(data_path=corpora.make_blend(path), data_cache_path=path / "cache")
    pretrain(pool, 1, flags(**data | TEACHER, save=path / "teacher", save_interval=11))
    home = Namespace(path=path, data=data, teacher=dict(teacher_load=path / "teacher"))
    record(pool, home, path / "whole", **WHOLE)
    return home


def record(pool, home, output, processes: int = 1, **changes) -> TargetStore:
    values = home.data | home.teacher | dict(record_teacher_logits=output, distillation_top_k=8) | changes
    pool.run(processes, _pretrain, flags(**values), timeout=240)
    return TargetStore.open(output)


def train(pool, home, processes: int = 1, **changes) -> list[dict]:
    return pretrain(pool, processes, flags(**home.data | changes))


@pytest.fixture(scope="module")
def top(pool, home) -> TargetStore:
    """The eight most likely ids, in fp16."""
    return record(pool, home, home.path / "top")


@pytest.mark.parametrize("layout", ["1", "tp2", "pp2", "dp2"])
def test_stored_in_full_is_the_online_teacher(pool, home, layout):
    """With a share that falls, of a blend; each layout reads what one process stored."""
    processes, changes = LAYOUTS[layout]
    share = dict(distillation_alpha=0.8, distillation_alpha_decay_style="linear")
    online = steps(train(pool, home, processes, **changes, **share, **home.teacher))
    stored = steps(train(pool, home, processes, **changes, **share, teacher_logits=home.path / "whole"))
    assert len(online) == 11 and online[0][1] > 0.1
    require_equal(stored, online)


def test_the_loss_of_the_largest_in_half_precision(pool, home, top):
    online = steps(train(pool, home, **home.teacher, distillation_top_k=8))
    stored = steps(train(pool, home, teacher_logits=top.path))
    for here, there in zip(stored, online, strict=True):
        assert here[1] == pytest.approx(there[1], abs=1e-3) and here[1] != there[1]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("1", "pp2-interleaved")])
def test_targets_do_not_depend_on_the_layout(pool, home, tmp_path, layout):
    processes, changes = LAYOUTS[layout]
    found = record(pool, home, tmp_path / "whole", processes, **changes, **WHOLE)
    assert found.manifest == TargetStore.open(home.path / "whole").manifest
    for name in range(SAMPLES):
        probabilities = [np.zeros((32, 256)), np.zeros((32, 256))]
        for each, store in zip(probabilities, (found, TargetStore.open(home.path / "whole")), strict=True):
            ids, logprobs, rest = store[name]
            np.put_along_axis(each, ids.numpy(), logprobs.exp().numpy(), axis=1)
            assert (rest < 1e-6).all()
        np.testing.assert_allclose(*probabilities, atol=1e-6)


#: Small passes, each marked and followed by a rest, so that a kill falls between them or into one.
_SLOW_RECORDING = """
import sys, time
import pretrain_pangu_pro
from megatron_ext.data import teacher_store
from megatron_ext.training import recording
recording.MICROBATCHES_PER_STAGE, teacher_store.MARK_EVERY_S = 2, 0.0
write = teacher_store.TargetWriter.write
teacher_store.TargetWriter.write = lambda *args: (write(*args), time.sleep(0.3))
pretrain_pangu_pro.main(sys.argv[1:])
"""


def test_killed_recording_goes_on(home, top, tmp_path):
    """SIGKILL at a random moment, and restarted: the same bytes as without."""
    paths = TargetPaths.of(tmp_path / "targets")
    values = home.data | home.teacher | dict(record_teacher_logits=paths.records, distillation_top_k=8)
    command = [sys.executable, "-c", _SLOW_RECORDING, *flags(**values)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while recorded(paths) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen = recorded(paths)
    assert 0 < seen < SAMPLES
    output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert f"{seen:,} are there" in output
    assert paths.records.read_bytes() == top.path.read_bytes()
    assert json.loads(paths.manifest.read_text()) == top.manifest


def recorded(paths: TargetPaths) -> int:
    try:
        return json.loads(paths.manifest.read_text())["recorded"]
    except FileNotFoundError:
        return 0


def test_a_round_with_its_targets_resumes(pool, home, tmp_path):
    """Two epochs and a bit over half of the samples; resumed bit for bit, and as with the online teacher."""
    losses_home = Namespace(path=home.path, data=home.data | TEACHER)
    shutil.copytree(home.path / "teacher", home.path / "round1", dirs_exist_ok=True)
    index = build(record_losses(pool, losses_home, tmp_path / "losses").path, tmp_path)
    values = dict(round_index=index, train_iters=14, load=tmp_path / "none")
    online = steps(train(pool, home, **values, **home.teacher))
    values["teacher_logits"] = home.path / "whole"
    whole = steps(train(pool, home, **values))
    require_equal(whole, online)
    values |= dict(save=tmp_path / "save", load=tmp_path / "save", save_interval=9)
    first = steps(train(pool, home, **values, exit_interval=9))
    assert first + steps(train(pool, home, **values)) == whole


def test_interleaved_stages_read_the_store(pool, home):
    processes, changes = LAYOUTS["pp2-interleaved"]
    values = dict(teacher_logits=home.path / "whole")
    require_equal(
        steps(train(pool, home, processes, **changes, **values)), steps(train(pool, home, **values)), 1e-5
    )


def test_across_the_vocabulary(pool, tmp_path):
    """Targets of a teacher whose vocabulary was cut: none within its tokens, online as stored."""
    theirs, mine = of_two_vocabularies(tmp_path)
    data = MODEL | TRAINING | dict(split="1,0,0")
    pretrain(pool, 1, flags(**data | TEACHER | theirs, save=tmp_path / "teacher", save_interval=11))
    home = Namespace(data=data | mine, teacher=dict(teacher_load=tmp_path / "teacher"))
    store = record(pool, home, tmp_path / "store", distillation_top_k=2000, teacher_logits_dtype="fp32")
    none = np.mean([(store[number].rest < 0).float().mean() for number in range(len(store))])
    assert 0.05 < none < 0.6
    online = steps(train(pool, home, **home.teacher))
    require_equal(steps(train(pool, home, teacher_logits=store.path)), online)


BAD = [
    (dict(seq_length=16), "--seq-length: 32 there, 16 here"),
    (dict(vocab_size=200), "--tokenizer-model:"),
    (dict(seed=7), "--seed: 1234 there, 7 here"),
    (dict(train_iters=10), "samples drawn"),
    (dict(distillation_temperature=2.0), "--distillation-temperature: 1.0 there, 2.0 here"),
    (dict(distillation_top_k=16), "--distillation-top-k: 8 there, 16 here"),
    (dict(reset_position_ids=True), "--reset-position-ids: False there, True here"),
    (dict(teacher_load="x"), "--teacher-logits has predicted before: give one"),
    (dict(record_teacher_logits="x"), "--record-teacher-logits cannot take effect: needs --teacher-load"),
    (dict(teacher_logits="nowhere"), "nowhere.json: No such file or directory"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_what_cannot_be_is_refused(pool, home, top, capfd, changes, words):
    with pytest.raises(WorkerError) as error:
        train(pool, home, **dict(teacher_logits=top.path) | changes)
    assert words in re.sub(r"\s+", " ", str(error.value) + capfd.readouterr().err)


def test_a_recording_of_another_teacher_is_refused(pool, home, top, tmp_path, capfd):
    pretrain(pool, 1, flags(**home.data | TEACHER, save=tmp_path, save_interval=11, seed=5))
    for changes, words in (
        (dict(teacher_load=tmp_path), "the teacher's weights: "),
        (dict(distillation_top_k=0), "needs --distillation-top-k, such as 32"),
        (dict(round_index="x"), "records the whole training set: leave out --round-index"),
    ):
        with pytest.raises(WorkerError) as error:
            record(pool, home, top.path, **changes)
        assert words in re.sub(r"\s+", " ", str(error.value) + capfd.readouterr().err)

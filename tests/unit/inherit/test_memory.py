"""A source of 7B shape is sliced in a small machine's memory; only with LONG_TESTS=1 (make test-long).

INHERIT_LAYERS sets its number of layers (2): a layer is 0.4 GB on disk, the rest 0.5 GB.
"""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from megatron_ext.data.indexed import write_index
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.conftest import REPOSITORY
from tests.helpers.big_model import llama_7b, write_llama
from tests.unit.tokenizer.sample_models import corpus_lines, trained

pytestmark = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="minutes of work: LONG_TESTS=1")
LAYERS = int(os.environ.get("INHERIT_LAYERS", "2"))
TARGET = "--target-hidden-size 1792 --target-ffn-hidden-size 4864 --target-num-attention-heads 14".split()
CALIBRATION = "--seq-length 64 --micro-batch-size 2 --calibration-samples 4 --calibration-dtype bf16".split()
GIB = 1 << 30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """source/: the model with a small tokenizer; text: a dataset in its ids."""
    path = tmp_path_factory.mktemp("big")
    write_llama(path / "source", llama_7b(LAYERS))
    (path / "source" / "tokenizer.model").write_bytes(trained())
    encoder = NativeEncoder(model_proto=trained())
    flat, sizes = encoder.encode_batch_into(corpus_lines(random.Random(1), 200), append_eod=True)
    (path / "text.bin").write_bytes(flat.tobytes())
    with open(path / "text.idx", "wb") as file:
        write_index(file, flat.dtype, sizes, np.arange(len(sizes) + 1))
    return path


def peak(base, save, *flags: str) -> float:
    """Peak memory of the tool in GiB, in a separate process, including pages of the mapped source."""
    command = [sys.executable, REPOSITORY / "tools" / "inherit_checkpoint.py", "--load", base / "source"]
    command += ["--save", save, "--target-num-layers", str(max(1, LAYERS // 2)), *TARGET, *flags, "--json"]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    summary = json.loads(done.stdout)
    print(f"\n{flags[1]}: {LAYERS} layers, {summary['seconds']} s, {summary['peak_memory_gib']} GiB")
    return summary["peak_memory_gib"]


def test_magnitudes_hold_a_tensor_at_a_time(base, tmp_path):
    assert peak(base, tmp_path / "out", "--width-criterion", "l2") < 3.5


def test_text_is_read_with_one_copy_in_bf16(base, tmp_path):
    """The source once, at two bytes per parameter, plus memory that does not grow with its layers."""
    text = ["--data-path", str(base / "text"), "--data-cache-path", str(tmp_path / "cache"), *CALIBRATION]
    most = peak(base, tmp_path / "out", "--width-criterion", "taylor", "--depth-policy", "importance", *text)
    assert most < 2 * llama_7b(LAYERS).num_parameters / GIB + 3.5

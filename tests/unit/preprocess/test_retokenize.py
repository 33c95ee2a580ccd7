"""Translating a dataset equals preprocessing its text with the new tokenizer."""

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import check_layout, map_tokens, write_index
from megatron_ext.preprocess.retokenize import retokenize
from megatron_ext.tokenizer import compress
from megatron_ext.tokenizer.encoder import NativeEncoder
from tests.unit.tokenizer import sample_models as samples


def write(prefix: Path, encoder: NativeEncoder, texts: list[str]) -> None:
    """A dataset of one sequence a document, each ended by </s>."""
    flat, sizes = encoder.encode_batch_into(texts, append_eod=True)
    Path(f"{prefix}.bin").write_bytes(flat.tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, flat.dtype, sizes, np.arange(len(sizes) + 1))


@pytest.mark.parametrize("prefix_blank", [False, True])
def test_equals_encoding_the_text(tmp_path, prefix_blank):
    model = samples.trained(add_dummy_prefix=prefix_blank)
    (tmp_path / "old.model").write_bytes(model)
    old = NativeEncoder(model_proto=model)
    kept = np.array([i for i in range(old.vocab_size) if i % 3 or i < 300])
    new_model = compress.pruned_model(compress.read_proto(model), kept).SerializeToString()
    (tmp_path / "new.model").write_bytes(new_model)
    texts = [*samples.corpus_lines(random.Random(1), 200), "", " <sep> 的\n\n🙂", "x"]
    write(tmp_path / "old", old, texts)
    names = [str(tmp_path / name) for name in ("old", "old.model", "new.model", "new")]
    summary = retokenize(*names)
    flat, sizes = NativeEncoder(model_proto=new_model).encode_batch_into(texts, append_eod=True)
    index = check_layout(tmp_path / "new")
    assert map_tokens(tmp_path / "new", index).tolist() == flat.tolist()
    assert index.lengths.tolist() == sizes.tolist()
    assert summary["documents"] == len(texts) and summary["tokens"] == len(flat) > summary["tokens_before"]


def test_unknown_ids_are_refused(tmp_path):
    (tmp_path / "m.model").write_bytes(samples.trained())
    with open(tmp_path / "old.idx", "wb") as file:
        write_index(file, np.dtype(np.uint16), np.array([2], np.int32), np.arange(2))
    (tmp_path / "old.bin").write_bytes(np.array([300, 0], np.uint16).tobytes())
    model = str(tmp_path / "m.model")
    with pytest.raises(ValueError, match="its text is lost"):
        retokenize(str(tmp_path / "old"), model, model, str(tmp_path / "new"))

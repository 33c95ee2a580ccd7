"""A third-party model, imported by the tool, continues training and generates what transformers does."""

import contextlib
import importlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.arguments.parser import read_args
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.data import build_datasets
from megatron_ext.data.indexed import write_index
from megatron_ext.tokenizer import build_tokenizer
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.training.data import dataset_sizes
from tests.helpers.training import flags, losses, pretrain
from tests.unit.tokenizer.sample_models import corpus_lines, trained

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
PROMPTS = ["the model of", "import numpy", "the running encoder returns"]


def imported(base: Path, rows: int) -> Path:
    """theirs/: a toy Llama with its tokenizer of 500; ours/: what the tool makes of it; text: a dataset."""
    (base / "theirs").mkdir()
    (base / "theirs" / "tokenizer.model").write_bytes(trained(vocab_size=500))
    model = toys.model("llama", 2, False, vocab_size=rows, max_position_embeddings=64)
    model.save_pretrained(base / "theirs")
    convert = importlib.import_module("tools.convert_checkpoint")
    words = ["--from", "hf", "--to", "megatron", "--load", str(base / "theirs"), "--save", str(base / "ours")]
    assert convert.main(words) == 0
    encoder = NativeEncoder(model_proto=trained(vocab_size=500))
    flat, sizes = encoder.encode_batch_into(corpus_lines(random.Random(1), 200), append_eod=True)
    (base / "text.bin").write_bytes(flat.tobytes())
    with open(base / "text.idx", "wb") as file:
        write_index(file, flat.dtype, sizes, np.arange(len(sizes) + 1))
    return base


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return imported(tmp_path_factory.mktemp("imported"), 500)


def in_transformers(home: Path):
    return toys.transformers.AutoModelForCausalLM.from_pretrained(home / "theirs").eval()


def first_batch(argv: list[str]) -> list[dict]:
    """The samples that the first iteration of a run trains on."""
    run = read_args(argv)
    sizes = dataset_sizes(run.training, run.validation)
    dataset = build_datasets(run, build_tokenizer(run.tokenizer), sizes)[0]
    return [dataset[i] for i in range(run.training.global_batch_size)]


@pytest.mark.parametrize("rows", [500, 508])
def test_trains_on_from_their_loss(pool, tmp_path, rows):
    """No flag says what the model is: the checkpoint does. Both are padded to 512 rows, which are masked;
    rows without a piece of the tokenizer, as Qwen2 has, take part as in transformers."""
    (tmp_path / "home").mkdir()
    home = imported(tmp_path / "home", rows)
    argv = flags(
        pretrained_checkpoint=home / "ours", use_checkpoint_args=True, load=tmp_path / "run",
        data_path=home / "text", split="100,0,0", data_cache_path=tmp_path / "cache",
        seq_length=32, micro_batch_size=4, train_iters=20, lr=1e-2, lr_decay_style="constant",
        eval_iters=0, log_interval=100, num_workers=0,
    )  # fmt: skip
    found = losses(pretrain(pool, 1, argv))
    samples = pool.run(1, first_batch, argv)[0]
    tokens, labels = (
        torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in ("tokens", "labels")
    )
    with torch.no_grad():
        logits = in_transformers(home)(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert found[0] == pytest.approx(expected, rel=1e-6)
    assert np.mean(found[-5:]) < found[0] - 0.5


def written(load: str, prompts: list[str]) -> list[dict]:
    """The output of tools/generate_text.py, with the most likely token each time."""
    tool = importlib.import_module("tools.generate_text")
    argv = ["--load", load, "--temperature", "0", "--max-new-tokens", "16", "--json"]
    argv += [word for prompt in prompts for word in ("--prompt", prompt)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert tool.main(argv) == 0
    return json.loads(out.getvalue())["results"]


def test_writes_what_transformers_writes(home, pool):
    model = in_transformers(home)
    tokenizer = build_tokenizer(
        TokenizerConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(home / "theirs/tokenizer.model")
        )
    )
    for prompt, result in zip(PROMPTS, pool.run(1, written, str(home / "ours"), PROMPTS)[0], strict=True):
        ids = tokenizer.tokenize(prompt)
        theirs = model.generate(
            torch.tensor([ids]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=tokenizer.eod,
            pad_token_id=0,
        )[0].tolist()
        assert result["new_tokens"] == len(theirs) - len(ids)
        assert result["text"] == tokenizer.detokenize([i for i in theirs if i != tokenizer.eod])

"""A Qwen 3 of transformers: its tokenizer compressed, inherited, trained, and back in transformers."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.training import flags, losses, pretrain

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
VOCABULARY, SIZE = 151_646, 48_000


def tool(name: str, *words: object) -> None:
    """Run one of tools/ with these words."""
    assert importlib.import_module(f"tools.{name}").main([*map(str, words)]) == 0


def source(folder: Path, tokenizer: Path) -> Path:
    """A toy Qwen 3 with random weights and the real tokenizer of Qwen."""
    torch.manual_seed(0)
    config = toys.transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    toys.transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


def inherit(*words: object) -> None:
    tool("inherit_checkpoint", *words)


@torch.no_grad()
def logits_of_checkpoint(folder: str, ids: torch.Tensor) -> torch.Tensor:
    """What this project computes, in a world of one."""
    from megatron_ext.inference.load import load_for_inference
    from megatron_ext.training import distributed

    model = load_for_inference(folder)[0]
    logits = model(ids, torch.arange(ids.size(1)).expand_as(ids), None)
    distributed.finalize()
    return logits


def test_from_qwen3_to_qwen3(pool, shared, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [{"text": f"{word} is a word, and {number} a number; 词和数 {number}."} for number, word in
             enumerate("model data loss layer token head rotary norm expert batch".split() * 20)]  # fmt: skip
    text.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    big = source(tmp_path / "qwen3", shared / "data" / "tokenizers" / "qwen2-151646")
    tool(
        "compress_tokenizer", "--input", text, "--tokenizer-model", big, "--vocab-size", SIZE,
        "--output", tmp_path / "small",
    )  # fmt: skip
    small = tmp_path / "small_hf"
    tool(
        "preprocess_data", "--input", text, "--output-prefix", tmp_path / "data", "--append-eod",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", small, "--workers", 1,
    )  # fmt: skip
    pool.run(
        1, inherit, "--load", str(big), "--save", str(tmp_path / "half"), "--target-num-layers", 2,
        "--target-hidden-size", 16, "--target-ffn-hidden-size", 32, "--target-num-query-groups", 1,
        "--target-tokenizer-model", str(small), timeout=120,
    )  # fmt: skip
    argv = flags(
        pretrained_checkpoint=tmp_path / "half", use_checkpoint_args=True,
        load=tmp_path / "run", save=tmp_path / "run", save_interval=10,
        data_path=tmp_path / "data_text_document", split="100,0,0", seq_length=32,
        data_cache_path=tmp_path / "cache", micro_batch_size=4, train_iters=10, lr=1e-2, eval_iters=0,
        lr_decay_style="constant", log_interval=10, num_workers=0,
    )  # fmt: skip
    trace = losses(pretrain(pool, 1, argv))
    assert trace[-1] < trace[0] - 1
    tool(
        "convert_checkpoint", "--from", "megatron", "--to", "hf", "--load", tmp_path / "run",
        "--save", tmp_path / "out",
    )  # fmt: skip

    model = toys.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = toys.transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Qwen3ForCausalLM" and len(tokenizer) == SIZE
    sentence = "model is a word, 词和数 17."
    ids = torch.tensor([tokenizer(sentence)["input_ids"]])
    assert tokenizer.decode(ids[0]) == sentence
    ours = pool.run(1, logits_of_checkpoint, str(tmp_path / "run"), ids)[0]
    with torch.no_grad():
        theirs = model(ids).logits
    torch.testing.assert_close(ours[..., : theirs.size(-1)], theirs, rtol=1e-5, atol=1e-5)

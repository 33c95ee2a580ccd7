"""The whole tool: from a checkpoint and a tokenizer to a smaller checkpoint, and what it refuses."""

import dataclasses
import json
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint import load_checkpoint
from megatron_ext.config.model import ModelConfig
from megatron_ext.data.indexed import write_index
from megatron_ext.inherit.options import InheritOptions
from megatron_ext.inherit.selection import Selection
from megatron_ext.inherit.slicing import cut, source_key
from megatron_ext.inherit.target import target_model
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.interchange.tokenizer_files import of_path
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from megatron_ext.tokenizer.build import build_tokenizer, flags_of
from megatron_ext.tokenizer.compress_run import CompressOptions, compress
from megatron_ext.tokenizer.encoder import NativeEncoder
from megatron_ext.tokenizer.idmap import IdMap
from tests.helpers.parallel import Layout
from tests.unit.inherit import toy
from tests.unit.tokenizer import sample_bpe
from tests.unit.tokenizer import sample_models as samples

TOOL = Path(__file__).resolve().parents[3] / "tools" / "inherit_checkpoint.py"
SMALLER = (
    "--target-num-layers 2 --target-hidden-size 24 --target-ffn-hidden-size 30 --target-num-query-groups 3"
).split()
CALIBRATION = "--seq-length 32 --micro-batch-size 2 --calibration-samples 8".split()


def tool(argv: list) -> int:
    """Run the tool; its exit code."""
    try:
        return runpy.run_path(str(TOOL))["main"]([str(word) for word in argv])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A source checkpoint with its tokenizer, a smaller tokenizer, and a dataset."""
    path = tmp_path_factory.mktemp("inherit")
    for name, size in (("big", 900), ("small", 500)):
        (path / f"{name}.model").write_bytes(samples.trained(vocab_size=size))
    tokenizer = of_path(path / "big.model")
    model, generator = source_model(tokenizer.size), torch.Generator().manual_seed(0)
    drawn = lambda key: weights(key, model, generator)  # noqa: E731
    write_checkpoint(path / "source", model, torch.float32, drawn, tokenizer=tokenizer)
    encoder = NativeEncoder(str(path / "small.model"))
    flat, sizes = encoder.encode_batch_into(samples.corpus_lines(random.Random(1), 200), append_eod=True)
    (path / "text.bin").write_bytes(flat.tobytes())
    with open(path / "text.idx", "wb") as file:
        write_index(file, flat.dtype, sizes, np.arange(len(sizes) + 1))
    return path


def source_model(vocab_size: int) -> ModelConfig:
    rows = -(-vocab_size // 128) * 128
    return toy.config(vocab_size=vocab_size, padded_vocab_size=rows, max_position_embeddings=64)


def weights(key: str, model: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """Small weights around 0, or around 1 for gains and scales."""
    around = 1.0 if "norm" in key or key.endswith("scale") else 0.0
    return around + 0.1 * torch.randn(model.without_padding.parameters()[key], generator=generator)


def values(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    opened = open_source(checkpoint)
    return {key: opened.get(key) for key in opened.keys()}


def test_slices_a_checkpoint_and_its_vocabulary(folder, tmp_path, capsys):
    save = tmp_path / "out"
    argv = ["--load", folder / "source", "--save", save, *SMALLER, "--depth-policy", "ends", "--json"]
    assert tool([*argv, "--target-tokenizer-model", folder / "small.model", "--width-criterion", "l1"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((save / "inheritance" / "report.json").read_text())
    assert summary["depth"]["kept"] == [0, 2] and summary["target"]["num_attention_heads"] == 6
    assert (save / "inheritance" / "report.png").stat().st_size > 10_000

    kept = np.load(save / "inheritance" / "choice.npz")
    selection = Selection(**{name: torch.from_numpy(kept[name]) for name in kept.files})
    full, small, source = values(folder / "source"), values(save), open_source(folder / "source").model
    for key, value in small.items():
        if key not in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert torch.equal(value, cut(key, full[source_key(key, selection)], selection, source, None)), (
                key
            )
    big, little = (NativeEncoder(str(folder / f"{name}.model")).processor for name in ("big", "small"))
    rows = full["output_layer.weight"][:, selection.hidden]
    for i, row in enumerate(small["output_layer.weight"]):
        if (there := big.piece_to_id(little.id_to_piece(i))) != big.unk_id() or i == little.unk_id():
            assert torch.equal(row, rows[there])
    assert tool(argv) == 1 and "holds checkpoints already" in capsys.readouterr().err


def loads(save: str, layout: Layout, config: ModelConfig) -> None:
    """The checkpoint loads into the trainer's model at this layout."""
    run = toy.arguments(config, tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp)
    run = run.but(padded_vocab_size=config.padded_vocab_size, finetune=True)
    model = build_model(transformer_config(run), run)
    assert load_checkpoint(save, model=model, run=run) is not None


def test_loads_at_another_layout(folder, tmp_path, pool):
    assert tool(["--load", folder / "source", "--save", tmp_path / "out", "--target-num-layers", "2"]) == 0
    layout = Layout(tp=2, pp=2)
    pool.run(layout, loads, str(tmp_path / "out"), layout, open_source(tmp_path / "out").model)


def test_new_pi_modules_change_nothing(folder, tmp_path):
    """More terms and shortcuts than the source: the same model at step 0, and fresh weights by the seed."""
    more = ["--series-activation-order", "3", "--augmented-shortcuts", "2", "--seed", "7"]
    assert tool(["--load", folder / "source", "--save", tmp_path / "more", *more]) == 0
    before, after = values(folder / "source"), values(tmp_path / "more")
    layer = "decoder.layers.1."
    scale, up = layer + "mlp.series_activation.scale", layer + "self_attention.augmented_shortcut.up"
    down = layer + "self_attention.augmented_shortcut.down"
    assert torch.equal(after[scale][:2], before[scale]) and not after[scale][2].any()
    assert torch.equal(after[up][:, :4], before[up]) and not after[up][:, 4:].any()
    assert torch.equal(after[down][:4], before[down]) and after[down][4:].std() > 0.01
    for key in before.keys() - {scale, up, down}:
        if "series_activation" not in key and "augmented_shortcut" not in key:
            assert torch.equal(before[key], after[key])


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--target-hidden-size", "40"], "--target-hidden-size 40: the source has only 32"),
        (["--target-num-layers", "0"], "--target-num-layers 0: must be at least 1"),
        (["--target-num-attention-heads", "3"], "3 heads in 4 query groups: the source has 2 query heads"),
        (["--model-preset", "tiny"], "heads of 32 channels, but the source's have 8"),
        (["--model-preset", "huge"], "there is no such preset"),
        (["--augmented-shortcuts", "0"], "--augmented-shortcuts 0: the source has shortcuts"),
        (["--series-activation-order", "1"], "the source's series has 2 terms"),
        (
            ["--target-hidden-size", "25"],
            "--target-hidden-size 25 is not divisible by --augmented",
        ),
        (["--depth-policy", "list", "--layers", "0", "5", "1"], "the source has the layers 0 to 2"),
        (["--tokenizer-model", "SMALL"], "not the tokenizer that"),
        (["--target-tokenizer-model", "NONE"], "neither a SentencePiece file"),
        (["--data-path", "NONE", "--width-criterion", "taylor"], "NONE"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, flags, says):
    flags = [str(folder / "small.model") if word == "SMALL" else word for word in flags]
    assert tool(["--load", folder / "source", "--save", tmp_path / "out", *flags]) in (1, 2)
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("out/iter*"))


def test_a_preset_says_sizes_and_modules_alone():
    """Rotary base and scaling stay the source's, because its weights depend on them."""
    values = {"rotary_base": 500000, "use_rope_scaling": True, "rope_scaling_factor": 32.0}
    values |= {"layernorm_epsilon": 1e-6, "max_position_embeddings": 4096, "padded_vocab_size": 512}
    values |= {"num_layers": 12, "hidden_size": 256, "ffn_hidden_size": 512, "kv_channels": 32}
    source = toy.config(vocab_size=500, tied=True, **values)
    options = InheritOptions(load="a", save="b", model_preset="tiny", target_num_layers=6)
    target = target_model(options, source, 300)
    taken = {"hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2}
    taken |= {"num_layers": 6, "softmax_vocab_size": 300, "padded_vocab_size": 384}
    taken |= {"untie_embeddings_and_output_weights": True, "augmented_shortcut_reduction": 32}
    assert target == dataclasses.replace(source, **taken)


def test_a_command_line_has_all_its_problems_reported(folder, capsys):
    argv = [
        "--load",
        folder,
        "--save",
        "x",
        "--depth-policy",
        "learned",
        "--mask-state",
        "x",
        "--layers",
        "1",
    ]
    assert tool([*argv, "--mask-steps", "0", "--no-rescale-norms"]) == 2
    said = capsys.readouterr().err
    for problem in (
        "needs --width-criterion learned",
        "--layers and --depth",
        "--mask-state",
        "--mask-steps",
        "--no-rescale-norms cannot take effect",
    ):
        assert problem in said
    assert tool(["--load", folder, "--save", "x", "--width-criterion", "taylor"]) == 2
    assert "--width-criterion taylor looks at text: give --data-path" in capsys.readouterr().err
    learned = ["--width-criterion", "learned", "--data-path", "x", "--mask-batch-size", "2"]
    assert tool(["--load", folder, "--save", "x", *learned]) == 2
    assert "--mask-batch-size 2 is not divisible by --micro-batch-size" in capsys.readouterr().err


def calibrated(folder: str, save: str, flags: list[str]) -> None:
    """A run of the tool that looks at text, on each rank of the job."""
    argv = ["--load", f"{folder}/source", "--save", save, *SMALLER, *CALIBRATION]
    argv += ["--target-tokenizer-model", f"{folder}/small.model", "--data-path", f"{folder}/text"]
    assert tool([*argv, "--data-cache-path", f"{save}_cache", *flags]) == 0


LEARNED = "--width-criterion learned --depth-policy learned --mask-steps 6 --mask-batch-size 4".split()


def test_ranks_share_the_text(folder, tmp_path, pool):
    """Taylor and learned masks on two ranks select the same as on one rank, with the same losses."""
    reports = []
    for ranks in (1, 2):
        save = tmp_path / str(ranks)
        pool.run(ranks, calibrated, str(folder), str(save), LEARNED, timeout=200)
        reports.append(json.loads((save / "inheritance" / "report.json").read_text()))
    one, two = reports
    assert one["depth"]["kept"] == two["depth"]["kept"]
    assert one["learned"]["losses"] == pytest.approx(two["learned"]["losses"], rel=1e-4)
    assert one["learned"]["tokens"] == two["learned"]["tokens"] == 6 * 4 * 32
    for name in ("loss_before", "loss_after"):
        assert one[name]["nats"] == pytest.approx(two[name]["nats"], rel=1e-4)
        assert one[name]["tokens"] == two[name]["tokens"]
    assert one["gain_factors"] == pytest.approx(two["gain_factors"], rel=1e-3)
    overlap = np.intersect1d(one["width"]["hidden"], two["width"]["hidden"]).size
    assert overlap >= 23


def test_gains_of_norms_are_rescaled_and_nothing_else_is(folder, tmp_path, pool):
    flags = "--depth-policy ends --width-criterion l2".split()
    saves = {}
    for name, more in (("with", []), ("without", ["--no-rescale-norms"])):
        save = tmp_path / name
        pool.run(1, calibrated, str(folder), str(save), [*flags, *more])
        report = json.loads((save / "inheritance" / "report.json").read_text())
        saves[name] = values(save), report.get("gain_factors", {})
    (scaled, factors), (plain, none) = saves["with"], saves["without"]
    assert not none and len(factors) == 5  # two layers with two norms, and the last
    for key, value in plain.items():
        torch.testing.assert_close(scaled[key], value * factors.get(key, 1.0), rtol=1e-6, atol=0)
        assert torch.equal(scaled[key], value) == (key not in factors)


@pytest.mark.parametrize("target", ["compressed", "sentencepiece"])
def test_from_a_byte_level_tokenizer(tmp_path, pool, target):
    """To a part of its ids, as the id map has them; to SentencePiece pieces, by the bytes of each."""
    full = of_path(sample_bpe.folder("llama3", tmp_path / "full"))
    model, generator = source_model(full.size), torch.Generator().manual_seed(0)
    write_checkpoint(
        tmp_path / "source", model, torch.float32, lambda key: weights(key, model, generator), tokenizer=full
    )
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in samples.corpus_lines(random.Random(1), 200))
    )
    tokenizer, kind = tmp_path / "small_hf", "HuggingFaceTokenizer"
    if target == "compressed":
        flags = {"tokenizer_model": str(tmp_path / "full"), "input": [str(tmp_path / "in.jsonl")]}
        compress(CompressOptions(output=str(tmp_path / "small"), vocab_size=500, **flags))
    else:
        tokenizer, kind = tmp_path / "small.model", "SentencePieceTokenizer"
        tokenizer.write_bytes(samples.trained(vocab_size=500))
    preprocess = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "data", "--append-eod"]
    preprocess += ["--tokenizer-type", kind, "--tokenizer-model", tokenizer]
    assert runpy.run_path(str(TOOL.with_name("preprocess_data.py")))["main"](list(map(str, preprocess))) == 0
    flags = ["--target-num-layers", "2", "--data-path", str(tmp_path / "data_text_document"), *CALIBRATION]
    flags += ["--target-tokenizer-model", str(tokenizer)]
    pool.run(1, inherited, str(tmp_path / "source"), str(tmp_path / "out"), flags, timeout=200)

    report = json.loads((tmp_path / "out" / "inheritance" / "report.json").read_text())
    vocabulary = report["vocabulary"]
    before, after = report["loss_before"], report["loss_with_target_vocabulary"]
    assert vocabulary["cost_bits_per_byte"] == after["bits_per_byte"] - before["bits_per_byte"]
    rows = values(tmp_path / "source")["embedding.word_embeddings.weight"]
    there = values(tmp_path / "out")["embedding.word_embeddings.weight"]
    assert vocabulary["copied"] + vocabulary["averaged"] == 500
    if target == "compressed":
        ids = IdMap.load(tmp_path / "small.idmap.npz")
        assert vocabulary["averaged"] == 0 and torch.equal(there[:500], rows[ids.old_id])
        assert (ids.old_sha256, ids.new_sha256) == (full.sha256, of_path(tokenizer).sha256)
        return
    ours, theirs = (build_tokenizer(flags_of(path)) for path in (tokenizer, tmp_path / "full"))
    for piece, text in (("▁t", " t"), ("的", "的"), ("<0x41>", "A"), ("</s>", "<|end_of_text|>")):
        start = rows[theirs.tokenize(text)].mean(0)
        assert torch.equal(there[ours.processor.piece_to_id(piece)], start), piece
    assert len(theirs.tokenize(" t")) > 1 and 0 < vocabulary["averaged"] < 250


def inherited(source: str, save: str, flags: list) -> None:
    assert tool(["--load", source, "--save", save, *flags, "--device", "cpu"]) == 0


def test_masks_resume_from_their_state(folder, tmp_path, pool):
    """Run again after all steps, nothing is trained; the state of another training is refused."""
    state = ["--mask-state", str(tmp_path / "state")]
    pool.run(1, calibrated, str(folder), str(tmp_path / "a"), LEARNED + state, timeout=200)
    pool.run(1, calibrated, str(folder), str(tmp_path / "b"), LEARNED + state, timeout=200)
    a, b = (json.loads((tmp_path / n / "inheritance" / "report.json").read_text()) for n in "ab")
    assert (
        a["learned"]["losses"] == b["learned"]["losses"]
        and a["learned"]["seconds"] == b["learned"]["seconds"]
    )
    assert a["width"] == b["width"] and a["loss_after"] == b["loss_after"]
    with pytest.raises(AssertionError, match="assert 1 == 0"):
        pool.run(1, calibrated, str(folder), str(tmp_path / "c"), [*LEARNED, *state, "--seed", "5"])


def test_bf16_chooses_what_fp32_chooses(folder, tmp_path, pool):
    """Up to units whose scores are close; the slice keeps the source's own number format."""
    reports = {}
    for dtype in ("fp32", "bf16"):
        flags = ["--width-criterion", "taylor", "--depth-policy", "importance", "--calibration-dtype", dtype]
        pool.run(1, calibrated, str(folder), str(tmp_path / dtype), flags, timeout=200)
        reports[dtype] = json.loads((tmp_path / dtype / "inheritance" / "report.json").read_text())
    fp32, bf16 = reports["fp32"], reports["bf16"]
    assert fp32["depth"]["kept"] == bf16["depth"]["kept"]
    assert fp32["depth"]["loss_without"] != bf16["depth"]["loss_without"]
    assert fp32["loss_before"]["nats"] == pytest.approx(bf16["loss_before"]["nats"], rel=5e-3)
    assert np.intersect1d(fp32["width"]["hidden"], bf16["width"]["hidden"]).size >= 23
    kept = [np.load(tmp_path / dtype / "inheritance" / "choice.npz")["ffn"] for dtype in ("fp32", "bf16")]
    same = [np.intersect1d(*rows).size / len(rows[0]) for rows in zip(*kept, strict=True)]
    assert np.mean(same) > 0.9
    assert open_source(tmp_path / "bf16").dtype == torch.float32

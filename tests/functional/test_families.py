"""Models of other makers: imported, cut to half, trained on, exported, and read by transformers."""

from pathlib import Path

import pytest
import torch

from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.checkpoint import load_checkpoint, read_checkpoint_args
from megatron_ext.inference import Sampling, generate
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from tests.helpers.parallel import Layout
from tests.helpers.training import flags, losses, pretrain
from tests.unit.inherit.test_inherit import tool

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
LAYERS = {
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}
#: maker -> what the exported half of it is; Gemma 3 scales its embedding by the square root of its width.
HALVES = {
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma3_text": "PanguPiForCausalLM",
}
IDS = torch.randint(0, toys.VOCABULARY, (1, toys.POSITIONS), generator=torch.Generator().manual_seed(0))


def ours(load: Path):
    """The model of a checkpoint, in a world of one."""
    run = arguments_of(read_checkpoint_args(load), load)
    model = build_model(transformer_config(run), run)
    assert load_checkpoint(load, model=model, run=run) is not None
    return model[0].eval()


@torch.no_grad()
def logits(load: Path) -> torch.Tensor:
    """[1, s, v] on IDS."""
    return ours(load)(IDS, torch.arange(IDS.size(1))[None], None)[..., : toys.VOCABULARY]


def half(source: Path, save: Path) -> Path:
    """Half of a source's layers, hidden and FFN channels and query groups."""
    words = (
        "--target-num-layers 2 --target-hidden-size 32 --target-ffn-hidden-size 48 "
        "--target-num-query-groups 1 --width-criterion l2"
    )
    assert tool(["--load", source, "--save", save, *words.split()]) == 0
    return save


@pytest.mark.parametrize("maker", HALVES)
@torch.no_grad()
def test_half_of_it_trains_on_and_is_read(pool, tmp_path, maker):
    theirs = toys.folder(tmp_path / "hf", maker, 2, False, num_hidden_layers=4, **LAYERS.get(maker, {}))
    inherited = half(theirs, tmp_path / "half")
    argv = flags(
        pretrained_checkpoint=inherited, use_checkpoint_args=True, load=tmp_path / "run",
        save=tmp_path / "run",
        mock_data=True, seq_length=32, micro_batch_size=2, train_iters=4, lr=1e-3, lr_decay_style="constant",
        eval_iters=0, log_interval=100, num_workers=0, save_interval=4,
    )  # fmt: skip
    assert len(losses(pretrain(pool, 1, argv))) == 4
    source = open_source(tmp_path / "run")
    assert source.model.num_parameters < open_source(theirs).model.num_parameters / 2
    out = export_folder(tmp_path / "out", source.model, source.dtype, source.get)
    read = toys.transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert type(read).__name__ == HALVES[maker]
    [found] = pool.run(Layout(), logits, tmp_path / "run")
    torch.testing.assert_close(found, read(IDS).logits, rtol=1e-5, atol=1e-5)


def test_layers_keep_what_they_are(tmp_path):
    """Of four layers the ends are kept, the first two and the last by name."""
    for maker, told in LAYERS.items():
        theirs = toys.folder(tmp_path / maker, maker, 2, False, num_hidden_layers=4, **told)
        words = "--target-num-layers 3 --depth-policy list --layers 0 1 3".split()
        assert tool(["--load", theirs, "--save", tmp_path / f"{maker}-3", *words]) == 0
    assert open_source(tmp_path / "smollm3-3").model.unrotated == (0, 1, 1)
    assert open_source(tmp_path / "gemma3_text-3").model.windowed == (1, 0, 0)


@pytest.mark.parametrize("maker", HALVES)
@torch.no_grad()
def test_writes_what_transformers_writes(single_process, tmp_path, maker):
    """Greedily, with the cache of keys and values, beyond the windows of Phi-3 and Gemma 3."""
    source = open_source(toys.folder(tmp_path / "hf", maker, 2, False))
    write_checkpoint(tmp_path / "ours", source.model, source.dtype, source.get)
    prompt = IDS[0, :7].tolist()
    found = list(generate(ours(tmp_path / "ours"), prompt, 20, Sampling(temperature=0), toys.VOCABULARY))
    theirs = toys.model(maker, 2, False)
    expected = theirs.generate(
        IDS[:, :7], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found == expected[0, 7:].tolist()

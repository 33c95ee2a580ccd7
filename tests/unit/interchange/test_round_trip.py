"""Models of other makers, through every layout of ours and back: same logits, same bits."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.checkpoint import load_checkpoint, read_checkpoint_args, save_checkpoint
from megatron_ext.interchange.convert import convert
from megatron_ext.interchange.export import export_folder
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.options import ConvertOptions
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.models.builder import build_model
from megatron_ext.models.config import transformer_config
from tests.helpers.parallel import Layout

toys = pytest.importorskip("tests.unit.interchange.toys", reason="needs transformers")
#: With sequence parallelism or without.
LAYOUTS = {
    "one": (Layout(), False),
    "tp2": (Layout(tp=2), False),
    "tp2-sequence-parallel": (Layout(tp=2), True),
    "pp2": (Layout(pp=2), False),
    "tp2-pp2": (Layout(tp=2, pp=2), False),
}
IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """For each toy its maker's folder, NAME/hf, and a checkpoint of ours, NAME/ours."""
    base = tmp_path_factory.mktemp("toys")
    for number, (name, toy) in enumerate(toys.TOYS.items()):
        theirs = toys.folder(base / name / "hf", *toy, shards=number % 2 == 0 and toy[0] != "internlm2")
        source = open_source(theirs)
        write_checkpoint(base / name / "ours", source.model, source.dtype, source.get)
    toys.checkpoint(base / "pi" / "ours", toys.pi_model(max_position_embeddings=32))
    pi = open_source(base / "pi" / "ours")
    export_folder(base / "pi" / "hf", pi.model, pi.dtype, pi.get)
    return base


def through(layout: Layout, sequence: bool, base: Path, out: Path) -> dict[str, torch.Tensor | None]:
    """Load every toy at this layout, compute its logits, save it again from here; one rank's part."""
    return {
        name: _through_one(layout, sequence, base / name / "ours", out / name) for name in (*toys.TOYS, "pi")
    }


@torch.no_grad()
def _through_one(layout: Layout, sequence: bool, load: Path, save: Path) -> torch.Tensor | None:
    run = arguments_of(read_checkpoint_args(load), load, layout=(layout.tp, layout.pp))
    run.parallel.sequence_parallel = sequence
    model = build_model(transformer_config(run), run)
    assert load_checkpoint(load, model=model, run=run) is not None
    save_checkpoint(save, 7, model=model, optimizer=None, scheduler=None, run_state={}, run=run)
    return _logits(model[0].eval())


def _logits(model) -> torch.Tensor | None:
    """[b, s, v] on the ranks of the last pipeline stage, None on the others."""
    positions = torch.arange(IDS.size(1)).expand_as(IDS)
    group = parallel_state.get_pipeline_model_parallel_group()
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(IDS.size(1), IDS.size(0), 64)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
        model.set_input_tensor(hidden)
    output = model(IDS, positions, None, runtime_gather_output=True)
    if parallel_state.is_pipeline_last_stage():
        return output
    torch.distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
    return None


@pytest.mark.parametrize("name", LAYOUTS)
def test_through_a_layout_and_back(pool, imported, tmp_path, name):
    layout, sequence = LAYOUTS[name]
    ranks = pool.run(layout, through, layout, sequence, imported, tmp_path, timeout=240)
    for name in (*toys.TOYS, "pi"):
        with torch.no_grad():
            expected = in_transformers(imported, name)(IDS).logits
        found = [rank[name] for rank in ranks if rank[name] is not None]
        assert len(found) == layout.tp
        for logits in found:
            torch.testing.assert_close(logits[..., : toys.VOCABULARY], expected, rtol=1e-5, atol=1e-5)
        maker = toys.TOYS[name][0] if name in toys.TOYS else None
        convert(options(tmp_path / name, tmp_path / f"{name}-hf", hf_architecture=maker))
        back, original = (toys.tensors_of(p) for p in (tmp_path / f"{name}-hf", imported / name / "hf"))
        assert back.keys() == original.keys()
        assert all(torch.equal(back[key], original[key]) for key in original), name


def in_transformers(imported: Path, name: str):
    """The model that a toy is, or ours from its folder."""
    if name in toys.TOYS:
        return toys.model(*toys.TOYS[name])
    load = toys.transformers.AutoModelForCausalLM.from_pretrained
    return load(imported / name / "hf", trust_remote_code=True).eval()


def options(load: Path, save: Path, **changes) -> ConvertOptions:
    """An export."""
    return ConvertOptions(source="megatron", target="hf", load=str(load), save=str(save), **changes)

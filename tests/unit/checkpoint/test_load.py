"""The content of a checkpoint, the layouts that can load it, and what is refused."""

import pickle

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.safe_globals import SAFE_GLOBALS

from megatron_ext.checkpoint import (
    CheckpointError,
    checkpoint_dir,
    load_checkpoint,
    read_checkpoint_args,
    save_checkpoint,
)
from megatron_ext.checkpoint.content import unwrap
from megatron_ext.checkpoint.integrity import CHECKSUMS
from megatron_ext.checkpoint.safe import load_metadata, load_object
from tests.helpers.parallel import Layout
from tests.unit.checkpoint.tiny import Run, arguments


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in unwrap(run.model[0]).named_parameters()}


def loaded(folder, *flags: str) -> Run:
    run = Run(arguments(Layout(), *flags))
    run.state = load_checkpoint(folder, **run.parts)
    return run


def saving(folder) -> tuple[str, ...]:
    return "--save", str(folder), "--save-interval", "1"


def test_common_part_has_upstreams_names(saved):
    common = load_object(checkpoint_dir(saved, 2) / "common.pt")
    upstream = {
        "args",
        "checkpoint_version",
        "iteration",
        "optimizer",
        "opt_param_scheduler",
        "num_floating_point_operations_so_far",
        "content_metadata",
    }
    assert set(common) == upstream | {"pangu_pro"}
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 2
    assert common["args"].consumed_train_samples == 8 and common["args"].num_layers == 4
    assert all(group["step"] == 2 for group in common["optimizer"]["param_groups"])
    assert read_checkpoint_args(saved).items() <= vars(common["args"]).items()
    assert read_checkpoint_args(saved, 1)["iteration"] == 1


def test_stock_megatron_core_reads_it(saved):
    folder = checkpoint_dir(saved, 2)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
        assert dist_checkpointing.load_common_state_dict(str(folder))["iteration"] == 2
    run = loaded(saved)
    key = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    expected = torch.stack([weights(run)[f"decoder.layers.{i}.input_layernorm.weight"] for i in range(4)])
    torch.testing.assert_close(tensors[key], expected, rtol=0, atol=0)
    assert "optimizer.state.exp_avg." + key in tensors


def test_older_names_of_the_norms_are_understood(saved):
    expected = loaded(saved)
    folder = checkpoint_dir(saved, 2)
    metadata = load_metadata(folder)

    def older(key: str) -> str:
        for new, old in (
            ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
            ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
        ):
            key = key.replace(new, old)
        return key

    metadata.state_dict_metadata = {older(k): v for k, v in metadata.state_dict_metadata.items()}
    for index in metadata.storage_data:
        object.__setattr__(index, "fqn", older(index.fqn))
    metadata.storage_data = dict(metadata.storage_data.items())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    common = load_object(folder / "common.pt")
    del common["pangu_pro"]  # as upstream's: no checksums to hold
    torch.save(common, folder / "common.pt")
    (folder / CHECKSUMS).unlink()

    found = loaded(saved)
    assert found.bits() == expected.bits()
    assert found.state.run_state["consumed_train_samples"] == 8


def test_another_tokenizer_is_refused_unless_finetuning(saved):
    run = Run(arguments(Layout()).but(tokenizer_sha256="1" * 64))
    with pytest.raises(CheckpointError, match="trained with another tokenizer"):
        load_checkpoint(saved, **run.parts)
    run.config.checkpoint.finetune = True
    found = load_checkpoint(saved, **run.parts)
    assert found.iteration == 0 and found.run_state == {} and not found.optimizer_loaded
    assert not run.optimizer.state_dict()["state"]
    reference = weights(loaded(saved))
    assert all(torch.equal(value, reference[name]) for name, value in weights(run).items())


@pytest.mark.parametrize("padded", [64, 96])
def test_vocabulary_padded_to_another_size_loads(saved, padded):
    run = Run(arguments(Layout()).but(padded_vocab_size=padded))
    load_checkpoint(saved, **run.parts)
    reference = weights(loaded(saved))
    found = weights(run)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        common = min(padded, 80)
        assert torch.equal(found[name][:common], reference[name][:common])
        assert not found[name][common:].any()


def test_another_model_is_refused_naming_the_flags(saved):
    run = Run(arguments(Layout(), "--ffn-hidden-size", "64", pi=""))
    with pytest.raises(CheckpointError, match="--ffn-hidden-size: checkpoint 48, this run 64") as failure:
        load_checkpoint(saved, **run.parts)
    assert "--series-activation-order: checkpoint 2, this run 0" in str(failure.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--rotary-base 1000000",
        "--norm-epsilon 1",
        "--use-rope-scaling --rope-scaling-factor 32",
        "--rotary-percent 0.5",
        "--position-embedding-type none",
        "--qk-layernorm",
    ],
)
def test_another_function_of_the_same_sizes_is_refused(saved, flags):
    run = Run(arguments(Layout(), *flags.split()))
    for run.config.checkpoint.finetune in (False, True):
        with pytest.raises(CheckpointError, match=f"holds another model: {flags.split()[0]}.*: checkpoint "):
            load_checkpoint(saved, **run.parts)


def test_a_checkpoint_that_says_nothing_is_named(saved, caplog):
    folder = checkpoint_dir(saved, 2)
    common = load_object(folder / "common.pt")
    for name in ("args", "pangu_pro"):
        del common[name]
    torch.save(common, folder / "common.pt")
    (folder / CHECKSUMS).unlink()
    assert loaded(saved, "--rotary-base", "7").state.iteration == 2
    assert "holds no arguments: whether it is of the same model is not known" in caplog.text


def test_weights_that_only_one_of_them_has_are_an_error(saved):
    run = Run(arguments(Layout(), "--qk-layernorm"))
    run.config = run.config.but(qk_layernorm=False)  # as a checkpoint whose args say what its weights are not
    with pytest.raises(CheckpointError, match="lacks .*q_layernorm"):
        load_checkpoint(saved, **run.parts)


def test_parts_left_out(saved_once, tmp_path):
    run = Run(arguments(Layout(), *saving(tmp_path), "--no-save-optim", "--no-save-rng")).train(1)
    save_checkpoint(tmp_path, 1, run_state=run.run_state, **run.parts)
    with pytest.raises(CheckpointError, match="no optimizer state .*--no-load-optim"):
        loaded(tmp_path)
    found = loaded(tmp_path, "--load", str(tmp_path), "--no-load-optim")
    assert found.state.iteration == 1 and not found.state.optimizer_loaded and not found.state.rng_loaded
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(found).items())


def test_schedule_can_be_overridden(saved):
    override = ("--load", str(saved), "--override-opt_param-scheduler")
    run = loaded(saved, *override, "--lr", "3e-3", "--min-lr", "1e-4")
    assert run.scheduler.num_steps == 8
    assert all(group["max_lr"] == 3e-3 for group in run.optimizer.param_groups)
    assert run.optimizer.param_groups[0]["lr"] == 3e-3  # warm-up ends after two iterations


def test_save_keeps_what_retention_says(saved_once, tmp_path):
    run = Run(arguments(Layout(), *saving(tmp_path), "--save-retain-interval", "2"))
    for iteration in (1, 2, 3, 4):
        save_checkpoint(tmp_path, iteration, run_state=run.run_state, **run.parts)
    left = sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir())
    assert left == ["iter_0000002", "iter_0000004"]


def test_unwritable_folder(saved_once, tmp_path):
    (tmp_path / "file").write_text("")
    run = Run(arguments(Layout()))
    with pytest.raises(CheckpointError, match="could not prepare --save .*file"):
        save_checkpoint(tmp_path / "file", 1, run_state=run.run_state, **run.parts)

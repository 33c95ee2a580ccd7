"""A checkpoint's arguments are data: they never enable code, disable a check, or choose a path to write."""

import contextlib
import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_ext.arguments import from_checkpoint
from megatron_ext.arguments.of_checkpoint import arguments_of
from megatron_ext.arguments.parser import read_args
from megatron_ext.checkpoint import CheckpointError, checkpoint_dir, read_checkpoint_args
from megatron_ext.checkpoint import saved_args as readers
from megatron_ext.checkpoint.integrity import CHECKSUMS, describe_file, marker
from megatron_ext.checkpoint.safe import load_object
from megatron_ext.common import command
from megatron_ext.config import RunConfig, model_function, options
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.inference.load import load_for_inference
from megatron_ext.interchange.convert import convert
from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.options import ConvertOptions
from megatron_ext.tokenizer import TokenizerError, build_tokenizer

#: What would trust code, loosen a check, name a place to read or write, or start something.
FOREIGN = {
    **dict.fromkeys(("trust_remote_code", "profile", "record_memory_history", "use_pytorch_profiler"), True),
    **dict.fromkeys(("finetune", "exit_on_missing_checkpoint", "async_save", "no_load_optim"), True),
    **dict.fromkeys(("save", "load", "pretrained_checkpoint", "tensorboard_dir", "wandb_save_dir"), "/evil"),
    **dict.fromkeys(("metrics_file", "memory_snapshot_path", "record_sample_loss", "round_index"), "/evil"),
    **dict.fromkeys(("data_cache_path", "data_args_path", "per_split_data_args_path"), "/evil"),
    **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_exp_name"), "evil"),
    **dict.fromkeys(("data_path", "train_data_path", "valid_data_path", "test_data_path"), ["/evil"]),
    **{"dist_ckpt_strictness": "ignore_all", "distributed_backend": "nccl", "device": "cuda"},
    **{"exit_signal": 9, "ckpt_step": 1, "local_rank": 7, "rank": 7, "spec": ["evil", "code"]},
}
CODE = """
open({trace!r}, "w").write("code of the checkpoint ran")
from transformers import PreTrainedTokenizer
class Evil(PreTrainedTokenizer):
    vocab_size = 256
    def get_vocab(self): return {{chr(i): i for i in range(256)}}
"""


def alter(saved: Path, **values) -> Path:
    """Change arguments of iteration 2 of a checkpoint, with checksums that fit; returns ``saved``."""
    folder = checkpoint_dir(saved, 2)
    common = load_object(folder / "common.pt")
    vars(common["args"]).update(values)
    common["pangu_pro"]["tokenizer_sha256"] = None
    torch.save(common, folder / "common.pt")
    files = {p.name: describe_file(p) for p in folder.iterdir() if p.name != CHECKSUMS}
    (folder / CHECKSUMS).write_bytes(marker(2, files))
    return saved


def evil_tokenizer(folder: Path, trace: Path) -> Path:
    """A Hugging Face folder whose tokenizer is Python code that leaves a trace."""
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(trace=str(trace)))
    auto_map = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return folder


def asked(load: Path) -> None:
    load_for_inference(str(load))


def converted(load: Path) -> None:
    words = ["--from", "megatron", "--to", "hf", "--load", str(load), "--save", f"{load}_converted"]
    tool = importlib.import_module("tools.convert_checkpoint")
    words += ["--max-shard-size", "1GB"]
    convert(command.read(tool.build_parser(), words, ConvertOptions)[0])


def inherited(load: Path) -> None:
    from megatron_ext.inherit.calibration_run import tokenizer_of

    tokenizer_of(open_source(load).tokenizer)


def resumed(load: Path) -> None:
    build_tokenizer(from_command_line(load).tokenizer)


def from_command_line(load: Path) -> RunConfig:
    flags = ["--use-checkpoint-args", "--load", str(load), "--mock-data", "--micro-batch-size", "1"]
    return read_args([*flags, "--train-iters", "1", "--lr", "1e-4"], world_size=1, check_files=False)


@pytest.mark.parametrize("reader", [asked, converted, inherited, resumed])
def test_code_beside_a_checkpoint_does_not_run(saved, tmp_path, reader):
    pytest.importorskip("transformers")
    folder = evil_tokenizer(tmp_path / "saved" / "tokenizer", tmp_path / "trace")
    alter(saved, **FOREIGN, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    with contextlib.suppress(ValueError, OSError, CheckpointError):  # an export copies its data files
        reader(saved)
    assert not (tmp_path / "trace").exists()


def test_the_code_would_run(tmp_path):
    pytest.importorskip("transformers")
    folder = evil_tokenizer(tmp_path / "tokenizer", tmp_path / "trace")
    flags = dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    with pytest.raises(TokenizerError, match="give --trust-remote-code"):
        build_tokenizer(TokenizerConfig(**flags))
    assert not (tmp_path / "trace").exists()
    with pytest.raises(TokenizerError, match="cannot load it"):  # it is no complete tokenizer
        build_tokenizer(TokenizerConfig(**flags, trust_remote_code=True))
    assert (tmp_path / "trace").exists()


def test_what_a_user_decides_is_not_taken_from_a_checkpoint(saved):
    plain, plainly_resumed = arguments_of(read_checkpoint_args(saved), saved), from_command_line(saved)
    saved_args = read_checkpoint_args(alter(saved, **FOREIGN))
    assert not set(saved_args) & set(FOREIGN)
    assert arguments_of(saved_args, saved) == plain and from_command_line(saved) == plainly_resumed
    assert not set(open_source(saved).saved) & set(FOREIGN)


def test_no_listed_argument_is_a_path_or_free_text():
    listed = {*readers.MODEL, *readers.TOKENIZER, *readers._TRAINING, *readers._MORE}
    needed = {*model_function.names(), *model_function.ALWAYS, *from_checkpoint.BESIDES}
    assert needed <= listed and not listed & set(FOREIGN)
    paths = {name for name in listed & set(options()) if options()[name].meta.get("metavar")}
    numbers = {"rampup_batch_size", "window_size", "window_attn_skip_freq", "no_rope_freq"}
    assert paths <= {"tokenizer_model", "tokenizer_type"} | numbers


WRONG = [
    *(("num_layers", value) for value in ("3", 10**600, True, -1, 2.0, [4])),
    *(("hidden_size", value) for value in (2**60, {"a": 1}, float("nan"))),
    *(("swiglu", value) for value in (1, "yes")),
    *(("layernorm_epsilon", value) for value in (float("nan"), float("inf"), "1e-5", 10**400)),
    *(("normalization", value) for value in ("Evil", 3, ["RMSNorm"])),
    *(("tokenizer_model", value) for value in (["x"], "x\0y", "x" * 5000)),
    *(("tokenizer_type", value) for value in ("EvilTokenizer", b"NullTokenizer")),
    *(("no_rope_freq", value) for value in ("[0,1]", [-1], [0] * 5000, [[0]], 1.5)),
    *(("window_size", value) for value in ("9,0", 9, (9.5, 0), (0,) * 5000)),
    *(("params_dtype", value) for value in ("torch.float32", 1)),
]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[name for name, _ in WRONG])
def test_a_value_of_another_type_is_refused(saved, number):
    name, value = WRONG[number]
    with pytest.raises(CheckpointError, match=rf"common.pt: its argument {name} is .{{1,400}}$"):
        read_checkpoint_args(alter(saved, **{name: value}))


@pytest.mark.parametrize("args", [3, "args", {"num_layers": 2}, [Namespace()]])
def test_args_that_are_no_arguments(saved, args):
    folder = checkpoint_dir(saved, 2)
    common = load_object(folder / "common.pt")
    torch.save(common | {"args": args}, folder / "common.pt")
    with pytest.raises(CheckpointError, match="not the arguments of a run"):
        read_checkpoint_args(saved, 2)


@pytest.mark.parametrize(
    "part", [{"iteration": "2"}, {"pangu_pro": [1]}, {"pangu_pro": {}}, {"optimizer": 1}, 7, [1]]
)
def test_a_common_part_that_is_none(saved, part):
    folder = checkpoint_dir(saved, 2)
    common = load_object(folder / "common.pt")
    torch.save(common | part if isinstance(part, dict) else part, folder / "common.pt")
    with pytest.raises(CheckpointError, match="common.pt"):
        read_checkpoint_args(saved, 2)


def test_a_checkpoint_that_does_not_say_what_it_is(saved):
    with pytest.raises(ValueError, match="--num-layers is required"):
        load_for_inference(str(alter(saved, num_layers=None)))


def test_a_checkpoint_without_a_tokenizer_takes_the_given_one(saved):
    run = arguments_of(read_checkpoint_args(saved), saved)
    assert run.tokenizer.tokenizer_type == "NullTokenizer"
    with pytest.raises(TokenizerError, match="'the' is not a number from 0 to 64: there is no tokenizer"):
        build_tokenizer(run.tokenizer).tokenize("the cat")
    with pytest.raises(TokenizerError, match="'65' is not"):
        build_tokenizer(run.tokenizer).tokenize("1 65")
    assert build_tokenizer(run.tokenizer).tokenize("1 64") == [1, 64]

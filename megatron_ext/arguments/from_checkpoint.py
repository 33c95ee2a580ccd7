"""What a command line leaves open of the model is taken from the checkpoint that the run starts from."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.common.errors import RunError
from megatron_ext.config import RunConfig, model_function
from megatron_ext.config.model_function import Saved
from megatron_ext.config.presets import PRESETS, preset_values

#: What ``--use-checkpoint-args`` takes besides the model's function (Megatron-LM's
#: checkpointing.py:load_args_from_checkpoint).
BESIDES = (
    "seq_length",
    "attention_dropout",
    "hidden_dropout",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
)


def take_model(values: dict[str, Any], typed: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Complete what the command line says of the model from the checkpoint that the run would start from.

    That is the one in --load, or, before there is one, that in --pretrained-checkpoint. What was typed,
    or set by a preset, stays, and must not contradict the checkpoint. ``--use-checkpoint-args`` takes the
    tokenizer and the dropouts too, what a preset says gives way to it, and it is a problem if there is no
    checkpoint and nothing else describes the model.

    Args:
        values: name -> value of every flag; completed here.
        typed: those of the command line.

    Returns problems, and a sentence on what was taken, None if nothing was.
    """
    asked = values["use_checkpoint_args"]
    if values["load"] is None:
        return (["--use-checkpoint-args needs --load"] if asked else []), None
    try:
        where, saved = start_of(RunConfig.of(values))
    except (RunError, OSError, ValueError) as error:
        # Without the flag, loading tells what is wrong with the checkpoint.
        return ([f"--use-checkpoint-args: {error}"] if asked else []), None
    if saved is None:
        # The first start of a run that is given its shape, as upstream has it.
        missing = asked and values["num_layers"] is None
        return ([f"--use-checkpoint-args: there is no checkpoint in {where}"] if missing else []), None
    if "num_layers" not in saved:
        problem = f"--use-checkpoint-args: the checkpoint in {where} holds no arguments"
        return ([problem] if asked else []), None
    said = {*typed}
    if not asked and values["model_preset"] in PRESETS:
        said |= preset_values(values["model_preset"]).keys()
    before = RunConfig.of(values)
    found = model_function.taken(saved, said, BESIDES if asked else ())
    values |= found
    after = RunConfig.of(values)
    told = ", ".join(
        f"{model_function.spelled(name)} {after.get(name)}"
        for name in found
        if after.get(name) != before.get(name)
    )
    others = model_function.differences(saved, after.model)
    problems = [f"the checkpoint in {where} is of another model: {'; '.join(others)}"] if others else []
    return problems, f"taken from the checkpoint in {where}: {told}" if told else None


def start_of(run: RunConfig) -> tuple[str, Saved | None]:
    """Where a run begins, in flags, and the arguments of the checkpoint that is there, if any.

    Raises RunError, OSError or ValueError for a checkpoint that cannot be read, or something else there.
    """
    from megatron_ext.checkpoint import outputs_of, read_checkpoint_args

    given = {
        "--load": run.checkpoint.load,
        "--pretrained-checkpoint": run.checkpoint.pretrained_checkpoint,
    }
    folders = {flag: folder for flag, folder in given.items() if folder is not None}
    for flag, folder in folders.items():
        step = run.checkpoint.ckpt_step if flag == "--load" else None
        saved = read_checkpoint_args(folder, step, outputs_of(run))
        if saved is not None:
            return f"{flag} {folder}", saved
    return " or ".join(f"{flag} {folder}" for flag, folder in folders.items()), None

"""Completes the model's flags from the checkpoint that the run starts from."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.common.errors import RunError
from megatron_ext.config import RunConfig, model_function
from megatron_ext.config.model_function import Saved
from megatron_ext.config.presets import PRESETS, preset_values

#: Arguments that ``--use-checkpoint-args`` takes besides the model's function (Megatron-LM's
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
    """Complete the model's flags from the checkpoint that the run starts from.

    That is the checkpoint in --load or, if there is none yet, in --pretrained-checkpoint. Flags on the
    command line and of a preset are kept, and must not contradict the checkpoint. ``--use-checkpoint-args``
    also takes the tokenizer and the dropouts, and overrides a preset; it is a problem if there is no
    checkpoint and nothing else describes the model.

    Args:
        values: name -> value of every flag; completed in place.
        typed: the flags on the command line.

    Returns problems, and a sentence on the values taken, None if there are none.
    """
    required = values["use_checkpoint_args"]
    if values["load"] is None:
        return (["--use-checkpoint-args needs --load"] if required else []), None
    try:
        where, saved = start_of(RunConfig.of(values))
    except (RunError, OSError, ValueError) as error:
        # Without the flag, the error is reported when the checkpoint is loaded.
        return ([f"--use-checkpoint-args: {error}"] if required else []), None
    if saved is None:
        # As upstream: the first start of a run whose flags describe the model.
        missing = required and values["num_layers"] is None
        return ([f"--use-checkpoint-args: there is no checkpoint in {where}"] if missing else []), None
    if "num_layers" not in saved:
        problem = f"--use-checkpoint-args: the checkpoint in {where} holds no arguments"
        return ([problem] if required else []), None
    given = {*typed}
    if not required and values["model_preset"] in PRESETS:
        given |= preset_values(values["model_preset"]).keys()
    before = RunConfig.of(values)
    taken = model_function.taken(saved, given, BESIDES if required else ())
    values |= taken
    after = RunConfig.of(values)
    changes = ", ".join(
        f"{model_function.spelled(name)} {after.get(name)}"
        for name in taken
        if after.get(name) != before.get(name)
    )
    others = model_function.differences(saved, after.model)
    problems = [f"the checkpoint in {where} is of another model: {'; '.join(others)}"] if others else []
    return problems, f"taken from the checkpoint in {where}: {changes}" if changes else None


def start_of(run: RunConfig) -> tuple[str, Saved | None]:
    """The flag and folder that a run starts from, and the arguments of the checkpoint there, if any.

    Raises RunError, OSError or ValueError if the checkpoint cannot be read, or the folder has other content.
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

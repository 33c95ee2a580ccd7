"""What a command line leaves open of the model is taken from the checkpoint that the run starts from."""

from argparse import Namespace

from megatron_ext.arguments import derive
from megatron_ext.common.errors import RunError
from megatron_ext.config import model_function
from megatron_ext.config.presets import PRESETS

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


def take_model(args: Namespace, typed: Namespace) -> tuple[list[str], str | None]:
    """Complete what the command line says of the model from the checkpoint that the run would start from.

    That is the one in --load, or, before there is one, that in --pretrained-checkpoint. What was typed,
    or set by a preset, stays, and must not contradict the checkpoint. ``--use-checkpoint-args`` takes the
    tokenizer and the dropouts too, what a preset says gives way to it, and it is a problem if there is no
    checkpoint and nothing else describes the model.

    Returns problems, and a sentence on what was taken, None if nothing was.
    """
    asked = args.use_checkpoint_args
    if args.load is None:
        return (["--use-checkpoint-args needs --load"] if asked else []), None
    try:
        where, saved = start_of(args)
    except (RunError, OSError, ValueError) as error:
        # Without the flag, loading tells what is wrong with the checkpoint.
        return ([f"--use-checkpoint-args: {error}"] if asked else []), None
    if saved is None:
        # The first start of a run that is given its shape, as upstream has it.
        missing = asked and args.num_layers is None
        return ([f"--use-checkpoint-args: there is no checkpoint in {where}"] if missing else []), None
    if not hasattr(saved, "num_layers"):
        return (
            [f"--use-checkpoint-args: the checkpoint in {where} holds no arguments"] if asked else []
        ), None
    said = set(vars(typed))
    if not asked and args.model_preset in PRESETS:
        said |= PRESETS[args.model_preset].flags().keys()
    before = derive.model_shape(Namespace(**vars(args)))
    taken = model_function.take(saved, args, said, BESIDES if asked else ())
    new = [name for name in taken if getattr(args, name) != getattr(before, name)]
    found = model_function.differences(saved, args)
    problems = [f"the checkpoint in {where} is of another model: {'; '.join(found)}"] if found else []
    told = ", ".join(f"{model_function.spelled(name)} {getattr(args, name)}" for name in new)
    return problems, f"taken from the checkpoint in {where}: {told}" if new else None


def start_of(args: Namespace) -> tuple[str, Namespace | None]:
    """Where a run with ``args`` begins, in flags, and the arguments of the checkpoint that is there, if any.

    Raises RunError, OSError or ValueError for a checkpoint that cannot be read, or something else there.
    """
    from megatron_ext.checkpoint import outputs_of, read_checkpoint_args

    folders = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint}
    folders = {flag: folder for flag, folder in folders.items() if folder is not None}
    for flag, folder in folders.items():
        step = args.ckpt_step if flag == "--load" else None
        saved = read_checkpoint_args(folder, step, outputs_of(args))
        if saved is not None:
            return f"{flag} {folder}", saved
    return " or ".join(f"{flag} {folder}" for flag, folder in folders.items()), None

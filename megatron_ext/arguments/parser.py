"""Parses a command line into a complete, validated configuration."""

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from megatron_ext.arguments import defaults, from_checkpoint, unsupported, validate
from megatron_ext.common.flags import add_group, default_of
from megatron_ext.config import RunConfig, options, sections
from megatron_ext.config.presets import PRESETS, preset_values
from megatron_ext.platform import Device

DESCRIPTION = """Pretrain PanGu-pi Pro, or any Llama-like model, with Megatron-Core.

Flags, defaults and meanings are Megatron-LM's where Megatron-LM has the idea. One process:
    python pretrain_pangu_pro.py --model-preset tiny --mock-data ...
Two processes that share the model by tensor parallelism, on a CPU or on two GPUs:
    torchrun --nproc-per-node 2 pretrain_pangu_pro.py --tensor-model-parallel-size 2 ..."""


class CommandLineError(ValueError):
    """An invalid command line; ``problems`` are the reasons, one sentence each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(f"  - {problem}" for problem in problems))
        self.problems = list(problems)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of exiting, so that all problems are reported together."""

    def error(self, message: str) -> NoReturn:
        raise CommandLineError([message])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps help without breaking lines inside a flag or a preset's name."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def make_parser() -> argparse.ArgumentParser:
    """The parser with a section for each group of flags; abbreviated flags are not accepted."""
    parser = _Parser(
        prog="pretrain_pangu_pro.py",
        usage="%(prog)s [flags]   (torchrun --nproc-per-node N %(prog)s [flags])",
        description=DESCRIPTION,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for title, group in sections().items():
        add_group(parser, title, group)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    *,
    world_size: int | None = None,
    device: Device | None = None,
    check_files: bool = True,
) -> RunConfig:
    """Parse, complete and validate; if there are problems print all of them and exit with code 2.

    Args:
        argv: the command line without the program; by default this process's.
        world_size: number of processes of the job; by default from the launcher's environment.
        device: ``"cpu"`` or ``"cuda"`` to check a command line for another machine; by default this
            process's device, which this call chooses.
        check_files: whether the data, the tokenizer and the output folders must exist.
    """
    try:
        return read_args(argv, world_size=world_size, device=device, check_files=check_files)
    except CommandLineError as error:
        _leave(error)


def read_args(
    argv: Sequence[str] | None = None,
    *,
    world_size: int | None = None,
    device: Device | None = None,
    check_files: bool = True,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> RunConfig:
    """:func:`parse_args` for callers that need the problems as an exception.

    ``change`` gets the typed values by name, and gives those to use.

    Raises:
        CommandLineError: with every problem of the command line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    namespace, unknown = make_parser().parse_known_args(argv)
    typed = change(vars(namespace))
    problems = unsupported.problems(unknown)
    values = with_defaults(typed, problems)
    of_checkpoint, taken = from_checkpoint.take_model(values, typed)
    run = RunConfig.of(values)
    _complete(run, typed, problems + of_checkpoint, world_size, device, check_files)
    if taken is not None and run.process.rank == 0:
        print(taken, file=sys.stderr)
    return run


def configured(
    values: Mapping[str, Any],
    *,
    world_size: int | None = None,
    device: Device | None = None,
    check_files: bool = True,
) -> RunConfig:
    """The configuration with these values, by name; other fields have their flags' defaults.

    It is completed and validated as in :func:`read_args`.

    Raises:
        CommandLineError: with every problem of the values.
    """
    run = RunConfig.of(with_defaults(values, []))
    _complete(run, {}, [], world_size, device, check_files)
    return run


def _complete(
    run: RunConfig,
    typed: Mapping[str, Any],
    problems: list[str],
    world_size: int | None,
    device: Device | None,
    check_files: bool,
) -> None:
    """Complete the configuration and validate it; ``problems`` were found before."""
    defaults.from_environment(run.process, world_size)
    problems = problems + defaults.device(run, device)
    warnings = defaults.before_rules(run)
    problems += validate.problems(run, MappingProxyType(typed), check_files)
    if problems:
        raise CommandLineError(problems)
    defaults.after_rules(run)
    if run.process.rank == 0:
        for warning in warnings:
            print(f"WARNING: {warning}", file=sys.stderr)


def with_defaults(typed: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Name -> value: defaults, overridden by the preset, overridden by the command line."""
    values = {name: default_of(option) for name, option in options().items()}
    values = {name: value.copy() if isinstance(value, list) else value for name, value in values.items()}
    if typed.get("model_preset") is not None:
        try:
            values |= preset_values(typed["model_preset"])
        except LookupError as error:
            problems.append(str(error.args[0]))
    values |= typed
    if "seq_length" in typed and "max_position_embeddings" not in typed and values["model_preset"] in PRESETS:
        # A preset is trained at its own length, but rotary positions are unlimited.
        values["max_position_embeddings"] = max(values["max_position_embeddings"], values["seq_length"])
    return values


def _leave(error: CommandLineError) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        # Rank 0 reports. torchrun ends the job as soon as one process fails, so the others wait.
        time.sleep(2)
        raise SystemExit(2)
    count = "a problem" if len(error.problems) == 1 else f"{len(error.problems)} problems"
    sys.stderr.write(
        f"pretrain_pangu_pro.py: {count} with the command line:\n{error}\nSee --help for every flag.\n"
    )
    raise SystemExit(2)

"""Validation of a command line by many small rules, each of which yields sentences that name the flags.

A rule is a function ``rule(run, typed)`` that yields problems: ``run`` is the complete configuration, and
``typed`` maps the destinations on the command line to their values. All rules run and all problems are
reported together; only numbers out of range and missing sizes are reported first, because other rules
calculate with them.
"""

from megatron_ext.arguments.validate import (
    amounts,
    dependencies,
    distillation,
    engine,
    files,
    layout,
    model,
    numbers,
    stages,
    training,
)
from megatron_ext.arguments.validate.rule import Rule, Typed
from megatron_ext.config import RunConfig


def problems(run: RunConfig, typed: Typed, check_files: bool = True) -> list[str]:
    """The problems of all rules; ``check_files=False`` does not look at this machine's files."""
    sentences = _apply(numbers.RULES, run, typed)
    calculable = not sentences and not numbers.missing(run)
    kinds = (model, engine, layout, training, amounts, distillation)
    rules = tuple(rule for kind in kinds for rule in kind.RULES) if calculable else ()
    sentences += _apply((*dependencies.RULES, *rules, *files.RULES), run, typed)
    sentences += stages.of_each_length(rules, run, typed, sentences)
    sentences += _apply(stages.RULES if calculable else stages.RULES_OF_THE_FILE, run, typed)
    if check_files:
        sentences += _apply((*files.RULES_OF_THIS_MACHINE, *stages.RULES_OF_THIS_MACHINE), run, typed)
    return sentences


def problems_of_model(run: RunConfig) -> list[str]:
    """The problems of the model itself, independent of its use."""
    sentences = _apply(numbers.RULES, run, {})
    return sentences if sentences or numbers.missing(run) else _apply(model.RULES_OF_SHAPE, run, {})


def problems_of_layout(run: RunConfig) -> list[str]:
    """The problems of dividing a valid model among the processes."""
    return _apply(layout.RULES_OF_DIVISION, run, {})


def _apply(rules: tuple[Rule, ...], run: RunConfig, typed: Typed) -> list[str]:
    return [problem for rule in rules for problem in rule(run, typed)]

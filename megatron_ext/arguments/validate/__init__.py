"""What a command line must fulfil, as many small rules, each a sentence that names the flags.

A rule is a function ``rule(run, typed)`` that yields its problems: ``run`` is the complete
namespace, ``typed`` maps the destinations that were on the command line to their values. Every rule
is asked and all problems are reported together; only a number that is out of range, or a missing
size, is reported before the rules that calculate with it.
"""

from megatron_ext.arguments.validate import (
    amounts,
    dependencies,
    engine,
    files,
    layout,
    model,
    numbers,
    training,
)
from megatron_ext.arguments.validate.rule import Rule, Typed
from megatron_ext.config import RunConfig


def problems(run: RunConfig, typed: Typed, check_files: bool = True) -> list[str]:
    """The problems of every rule; ``check_files=False`` leaves this machine's files out."""
    found = _ask(numbers.RULES, run, typed)
    calculable = not found and not numbers.missing(run)
    rules = (
        (*model.RULES, *engine.RULES, *layout.RULES, *training.RULES, *amounts.RULES) if calculable else ()
    )
    found += _ask((*dependencies.RULES, *rules, *files.RULES), run, typed)
    if check_files:
        found += _ask(files.RULES_OF_THIS_MACHINE, run, typed)
    return found


def problems_of_model(run: RunConfig) -> list[str]:
    """The problems of a model's sizes and kinds alone, whatever is done with it."""
    found = _ask(numbers.RULES, run, {})
    return found if found or numbers.missing(run) else _ask(model.RULES_OF_SHAPE, run, {})


def _ask(rules: tuple[Rule, ...], run: RunConfig, typed: Typed) -> list[str]:
    return [problem for rule in rules for problem in rule(run, typed)]

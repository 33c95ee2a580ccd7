"""What a command line must fulfil, as many small rules, each a sentence that names the flags.

A rule is a function ``rule(args, typed)`` that yields its problems: ``args`` is the complete
namespace, ``typed`` maps the destinations that were on the command line to their values. Every rule
is asked and all problems are reported together; only a number that is out of range, or a missing
size, is reported before the rules that calculate with it.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_ext.arguments.validate import amounts, effect, engine, files, layout, model, numbers, run


def problems(args: Namespace, typed: Mapping[str, Any], check_files: bool = True) -> list[str]:
    """The problems of every rule; ``check_files=False`` leaves this machine's files out."""
    found = _ask(numbers.RULES, args, typed)
    calculable = not found and not numbers.missing(args)
    rules = (*model.RULES, *engine.RULES, *layout.RULES, *run.RULES, *amounts.RULES) if calculable else ()
    found += _ask((*effect.RULES, *rules, *files.RULES), args, typed)
    if check_files:
        found += _ask(files.RULES_OF_THIS_MACHINE, args, typed)
    return found


def problems_of_model(args: Namespace) -> list[str]:
    """The problems of a model's sizes and kinds alone, whatever is done with it."""
    found = _ask(numbers.RULES, args, {})
    return found if found or numbers.missing(args) else _ask(model.RULES_OF_SHAPE, args, {})


def _ask(rules: tuple, args: Namespace, typed: Mapping[str, Any]) -> list[str]:
    return [problem for rule in rules for problem in rule(args, typed)]

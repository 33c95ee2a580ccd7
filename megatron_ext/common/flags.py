"""From a dataclass field to a command line flag: one source for name, type, default and help.

A field becomes a flag by the rules of Megatron-LM's own factory (megatron/training/argument_utils.py):

- the field's name is the destination in the parsed namespace; ``--name-with-hyphens`` is the flag;
- the annotation gives type and choices; ``bool`` gives a switch, ``--no-X``/``--disable-X`` if
  the default is True; a list accepts several values;
- ``metadata["argparse_meta"]`` overrides any of these, ``arg_names`` the spelling;
- the string under the field is the help.

A field also declares the range of its value (``Range``) and what it needs to have an effect (``Need``).
"""

import argparse
import ast
import dataclasses
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Need:
    """A flag has an effect only if ``holds(run)``; ``flags`` describes what to add or leave out."""

    flags: str
    holds: Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed numbers of a field, which must also be finite."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"between {self.minimum} and {self.maximum}"
        if self.minimum == 0 and self.below is None:
            return "0 or more"
        limits = {
            "at least": self.minimum,
            "above": self.above,
            "at most": self.maximum,
            "below": self.below,
        }
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a configuration class, from which a flag is made."""

    name: str
    annotation: Any
    default: Any
    meta: dict[str, Any]
    doc: str
    range: Range | None = None
    needs: Sequence[Need] = ()
    refused: Sequence[str] = ()
    section: str | None = None


class Offered(tuple[Any, ...]):
    """The choices of a flag in ``--help``; a rule explains why each of ``refused`` is unsupported."""

    refused: Sequence[str] = ()

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) or value in self.refused


def flag(
    value: Any = dataclasses.MISSING,
    *names: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    needs: Sequence[Need] = (),
    refused: Sequence[str] = (),
    section: str | None = None,
    **argparse_meta: Any,
) -> Any:
    """A dataclass field whose flag has a range or needs, or differs from its name and annotation.

    A field without a default is a required flag. ``refused``: values of Megatron-LM that a rule refuses here;
    ``--help`` does not list them. ``section``: the title in ``--help`` of this field and the next ones.
    """
    if names:
        argparse_meta["arg_names"] = list(names)
    limits = (minimum, maximum, above, below)
    allowed = None if limits == (None,) * 4 else Range(*limits)
    metadata = {
        "argparse_meta": argparse_meta,
        "range": allowed,
        "needs": tuple(needs),
        "refused": tuple(refused),
        "section": section,
    }
    if value is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(value, list):
        return dataclasses.field(default_factory=value.copy, metadata=metadata)
    return dataclasses.field(default=value, metadata=metadata)


def derived(value: Any) -> Any:
    """A dataclass field without a flag: it is derived from other fields, the machine or the data."""
    return dataclasses.field(default=value, metadata={"derived": True})


@cache
def own_options(cls: Any) -> list[Option]:
    """The options of a dataclass of ours, without derived fields."""
    docs: dict[str, str] = {}
    for base in cls.__mro__:
        if hasattr(base, "__dataclass_fields__"):
            tree = _module_tree(sys.modules[base.__module__].__file__)
            docs |= {name: doc for name, _, _, doc in _annotated_fields(_class_node(tree, base.__name__))}
    hints = typing.get_type_hints(cls)
    return [
        Option(
            f.name,
            hints[f.name],
            _default(f),
            f.metadata.get("argparse_meta", {}),
            docs[f.name],
            f.metadata.get("range"),
            f.metadata.get("needs", ()),
            f.metadata.get("refused", ()),
            f.metadata.get("section"),
        )
        for f in dataclasses.fields(cls)
        if not f.metadata.get("derived")
    ]


def add_group(parser: argparse.ArgumentParser, title: str, options: Iterable[Option]) -> None:
    """Add a titled section of flags; the help shows defaults, and the caller applies them."""
    group = parser.add_argument_group(title)
    for option in options:
        _add(group, option)


def add_flags(parser: argparse.ArgumentParser, cls: Any) -> None:
    """Add the flags of a dataclass, in sections that its fields start."""
    group: argparse._ActionsContainer = parser
    for option in own_options(cls):
        if option.section is not None:
            group = parser.add_argument_group(option.section)
        _add(group, option)


def _add(group: argparse._ActionsContainer, option: Option) -> None:
    names, keywords = argparse_form(option)
    group.add_argument(*names, dest=option.name, **keywords)


def argparse_form(option: Option) -> tuple[list[str], dict[str, Any]]:
    """The spellings and the ``add_argument`` keywords of an option.

    The default is suppressed, so that the parsed namespace holds only flags of the command line; a preset
    may set the others.
    """
    keywords: dict[str, Any]
    meta = dict(option.meta)
    default = meta.pop("default", option.default)
    spelled = "--" + option.name.replace("_", "-")
    if option.annotation is bool:
        stem = spelled[2:]
        on = [spelled] if option.default is not True else [f"--no-{stem}", f"--disable-{stem}"]
        keywords = {"action": "store_false" if option.default is True else "store_true"}
    else:
        keywords, on = {} if "type" in meta else _value_form(option.annotation), [spelled]
    names = meta.pop("arg_names", on)
    keywords.update(meta)
    if default is dataclasses.MISSING:
        keywords["required"] = True
    if option.refused:
        offered = Offered(choice for choice in keywords["choices"] if choice not in option.refused)
        offered.refused = option.refused
        keywords["choices"] = offered
    keywords["help"] = _help(option, default, keywords)
    keywords["default"] = argparse.SUPPRESS
    return names, keywords


def default_of(option: Option) -> Any:
    """The value of an option that is neither on the command line nor in a preset."""
    return option.meta.get("default", option.default)


def spelled(option: Option) -> str:
    """The first spelling of an option's flag."""
    return argparse_form(option)[0][0]


def wrong(option: Option, value: Any) -> Iterator[str]:
    """Problems of a value by itself; None means that it was not given, which is checked elsewhere."""
    if value is None:
        return
    if not fits(value, option.annotation):
        yield f"{spelled(option)} {value!r}: must be {kind(option.annotation)}"
    elif option.range is not None and not option.range.holds(value):
        yield f"{spelled(option)} {value}: must be {option.range}"


def wrong_fields(instance: Any) -> Iterator[str]:
    """Problems of each value of a dataclass of flags by itself."""
    cls: Any = type(instance)
    for option in own_options(cls):
        yield from wrong(option, getattr(instance, option.name))


def without_effect(given: Iterable[Option], values: Any) -> Iterator[str]:
    """Problems of ``given`` options that need others; ``values`` is what their needs look at."""
    idle: dict[Need, list[str]] = {}
    for option in given:
        for need in option.needs:
            if not need.holds(values):
                idle.setdefault(need, []).append(spelled(option))
    for need, flags in idle.items():
        yield f"{', '.join(flags)} cannot take effect: needs {need.flags}"


def given_fields(instance: Any) -> list[Option]:
    """The options of a dataclass of flags that are not as they are by default."""
    cls: Any = type(instance)
    return [option for option in own_options(cls) if getattr(instance, option.name) != default_of(option)]


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; numbers must be finite, integers below 2^63."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if origin is typing.Literal:
        return value in inner
    if annotation is int:
        return type(value) is int and abs(value) < 1 << 63
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, annotation)


def kind(annotation: Any) -> str:
    """A description of a type."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return kind(next(one for one in inner if one is not type(None)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(
        annotation, "of its type"
    )


def _help(option: Option, default: Any, keywords: dict[str, Any]) -> str:
    """The field's docstring, its default, and the flags that it needs."""
    notes = []
    if "action" not in keywords and default is not dataclasses.MISSING:
        shown = "none" if default is None or default == [] else getattr(default, "name", default)
        notes = [f"default: {' '.join(map(str, shown)) if isinstance(shown, list) else shown}"]
    notes += [f"needs {need.flags}" for need in option.needs]
    text = option.doc.rstrip(".") + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _value_form(annotation: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _value_form(next(kind for kind in inner if kind is not type(None)))
    if origin is list:
        return {**_value_form(inner[0]), "nargs": "+"}
    if origin is typing.Literal:
        return {"type": type(inner[0]), "choices": list(inner)}
    if annotation in (int, float, str):
        return {"type": annotation, "metavar": {int: "N", float: "X", str: "TEXT"}[annotation]}
    raise TypeError(f"no flag can be made from the annotation {annotation!r}")


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def _module_tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _class_node(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _annotated_fields(node: ast.ClassDef) -> Iterable[tuple[str, ast.AnnAssign, Any, str]]:
    """(name, statement, value, docstring) of each annotated field that has a docstring."""
    for statement, below in zip(node.body, node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(below, ast.Expr):
            continue
        if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            doc = " ".join(inspect.cleandoc(below.value.value).split())
            yield ast.unparse(statement.target), statement, statement.value, doc

"""From a dataclass field to a command line flag: one source for name, type, default and help.

A field gives the flag as Megatron-LM's own factory does (megatron/training/argument_utils.py):

- the field's name is the destination in the parsed namespace; ``--name-with-hyphens`` is the flag;
- the annotation gives type and choices; ``bool`` gives a switch, ``--no-X``/``--disable-X`` where
  the default is True; a list takes several values;
- ``metadata["argparse_meta"]`` overrides any of it, ``arg_names`` the spelling;
- the string under the field is the help.

Megatron-Core's configuration classes are read from their source text, because importing them costs
torch and several seconds, and a command line that is only parsed needs neither.
"""

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a configuration class, before it becomes a flag."""

    name: str
    annotation: Any
    default: Any
    meta: dict[str, Any]
    doc: str


def flag(value: Any, *names: str, **argparse_meta: Any) -> Any:
    """A dataclass field whose flag differs from what its name and annotation say."""
    if names:
        argparse_meta["arg_names"] = list(names)
    metadata = {"argparse_meta": argparse_meta}
    if isinstance(value, list):
        return dataclasses.field(default_factory=value.copy, metadata=metadata)
    return dataclasses.field(default=value, metadata=metadata)


def own_options(cls: type) -> list[Option]:
    """The options of a dataclass of ours."""
    tree = _module_tree(sys.modules[cls.__module__].__file__)
    docs = {name: doc for name, _, _, doc in _annotated_fields(_class_node(tree, cls.__name__))}
    hints = typing.get_type_hints(cls)
    return [
        Option(f.name, hints[f.name], _default(f), f.metadata.get("argparse_meta", {}), docs[f.name])
        for f in dataclasses.fields(cls)
    ]


def core_options(module: str, class_name: str, names: Sequence[str]) -> list[Option]:
    """The named fields of one of Megatron-Core's dataclasses, read without importing it.

    Args:
        module: dotted path below ``megatron.core``, such as ``"model_parallel_config"``.

    Raises:
        LookupError: the installed Megatron-Core has no such field.
    """
    tree = _module_tree(str(_core_folder().joinpath(*module.split("."))) + ".py")
    found = {name: (node, doc) for name, node, _, doc in _annotated_fields(_class_node(tree, class_name))}
    missing = [name for name in names if name not in found]
    if missing:
        raise LookupError(f"megatron.core.{module}.{class_name} has no field {', '.join(missing)}")
    return [_core_option(name, *found[name]) for name in names]


def add_group(parser: argparse.ArgumentParser, title: str, options: Iterable[Option]) -> None:
    """Add one titled section of flags; defaults are shown in the help and kept by the caller."""
    group = parser.add_argument_group(title)
    for option in options:
        names, keywords = argparse_form(option)
        group.add_argument(*names, dest=option.name, **keywords)


def argparse_form(option: Option) -> tuple[list[str], dict[str, Any]]:
    """The spellings and the ``add_argument`` keywords of an option.

    The default is suppressed, so that the parsed namespace holds what was typed and no more: this
    is how a preset knows which values it may set.
    """
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
    keywords["help"] = _help(option.doc, default, keywords)
    keywords["default"] = argparse.SUPPRESS
    return names, keywords


def default_of(option: Option) -> Any:
    """The value of an option that is neither typed nor in a preset."""
    return option.meta.get("default", option.default)


def _help(doc: str, default: Any, keywords: dict[str, Any]) -> str:
    text = doc.replace("%", "%%").rstrip(".")
    if "action" in keywords:
        return text
    shown = "none" if default is None or default == [] else getattr(default, "name", default)
    shown = " ".join(map(str, shown)) if isinstance(shown, list) else shown
    return f"{text} (default: {shown})"


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


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def _core_folder() -> Path:
    for folder in importlib.util.find_spec("megatron").submodule_search_locations:
        if Path(folder, "core", "__init__.py").exists():
            return Path(folder, "core")
    raise ModuleNotFoundError("megatron-core is not installed; pip install -c constraints.txt .")


@cache
def _module_tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _class_node(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _annotated_fields(node: ast.ClassDef) -> Iterable[tuple[str, ast.AnnAssign, Any, str]]:
    """(name, statement, value, docstring) of each annotated field that has a string under it."""
    for statement, below in zip(node.body, node.body[1:], strict=False):
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and documented:
            doc = " ".join(inspect.cleandoc(below.value.value).split())
            yield statement.target.id, statement, statement.value, doc


#: The names that the annotations and defaults of the fields we take from Megatron-Core use.
_VOCABULARY = {name: getattr(typing, name) for name in ("List", "Literal", "Optional", "Tuple", "Union")} | {
    "field": dataclasses.field
}


def _core_option(name: str, statement: ast.AnnAssign, doc: str) -> Option:
    def evaluate(node: ast.expr) -> Any:
        return eval(ast.unparse(node), dict(_VOCABULARY))

    default, meta = evaluate(statement.value), {}
    if isinstance(default, dataclasses.Field):
        meta = default.metadata.get("argparse_meta", {})
        default = _default(default)
    return Option(name, evaluate(statement.annotation), default, dict(meta), doc)

"""The rooms of the house as .importlinter orders them, with what an import linter does not see.

Counted are all imports, those inside functions too, and the modules that are named in strings, by which
the seams of the platform reach the kernels.
"""

import ast
import configparser
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_ext"


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    files = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
    names = (".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files)
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def named(name: str) -> str:
    """The module that a dotted name lies in."""
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def reached(tree: ast.Module):
    """The modules of ours that a file imports anywhere, or names in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield from (named(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (named(alias.name) for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if found := re.fullmatch(rf"({PACKAGE}(?:\.\w+)+)(?::\w+)?", node.value):
                yield named(found[1])


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> modules that it reaches; the package itself only sets the platform up."""
    found = defaultdict(set)
    for name, file in modules().items():
        if name != PACKAGE:
            found[name] = {*reached(ast.parse(file.read_text(encoding="utf-8")))} - {name, PACKAGE}
    return found


def floors() -> dict[str, int]:
    """Room -> its floor, from below."""
    contracts = configparser.ConfigParser()
    contracts.read(REPOSITORY / ".importlinter")
    rows = contracts["importlinter:contract:layers"]["layers"].split("\n")
    rows = [row for row in rows if row.strip()][::-1]
    return {room.strip(): floor for floor, row in enumerate(rows) for room in row.split("|")}


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_seams_are_seen():
    assert "megatron_ext.kernels.rope" in arrows()["megatron_ext.platform.seams"]


def test_every_room_has_its_floor():
    packages = {path.name for path in (REPOSITORY / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert floors().keys() == packages
    assert [name for name in modules() if name != PACKAGE and room(name) not in packages] == []


def test_rooms_stand_on_those_below_them():
    floor = floors()
    up = [
        f"{source} -> {target}"
        for source, targets in arrows().items()
        for target in targets
        if room(source) != room(target) and floor[room(target)] >= floor[room(source)]
    ]
    assert up == []


def test_no_circle_between_files():
    """Take away, again and again, the files that reach none of those that are left."""
    left = {name: set(targets) for name, targets in arrows().items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert sorted(left) == []

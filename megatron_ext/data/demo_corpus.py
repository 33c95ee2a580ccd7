"""Text worth reading from every Python installation: what its modules and functions say of themselves.

Docstrings are prose about mathematics, graphs, languages and machines, with examples. Code is left out, and
so are licences.
"""

import ast
import gzip
import json
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from megatron_ext.common.files import sha256, write_aside

#: Shorter texts have little content, longer ones are mostly tables.
MIN_CHARACTERS, MAX_CHARACTERS = 400, 60_000
#: A docstring of fewer characters repeats its function's name.
MIN_DOCSTRING = 120
#: The first kind first: if space is short, it is kept.
SHARES = (("documentation", 0.25), ("standard library", 0.5), ("packages", 1.0))
#: Of the whole, from one package: large ones repeat themselves.
LARGEST_SHARE = 0.06
#: Texts that are too long for what is left of a kind, before the search for a shorter one ends.
MOST_MISSES = 50
VALID_SHARE = 0.02
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
LICENCE = re.compile(
    r"licen[cs]e|copyright|all rights reserved|permission is (hereby )?granted|redistribution|warrant(y|ies)",
    re.I,
)
TESTS = ("test", "tests", "testing")


def collect(max_bytes: int) -> list[dict[str, Any]]:
    """Documents {"text", "source"} of at most ``max_bytes`` UTF-8 bytes, ordered by the hash of their text.

    Files are read in the order of the hashes of their names, until there are enough.
    """
    seen: set[str] = set()
    chosen: list[tuple[str, dict[str, Any]]] = []
    total, of_package = 0, Counter[str]()
    largest = max(LARGEST_SHARE * max_bytes, MAX_CHARACTERS)
    kinds = {"documentation": _documentation, "standard library": _standard_library, "packages": _packages}
    for kind, share in SHARES:
        allowed, misses = total + (max_bytes - total) * share, 0
        for source, read in kinds[kind]():
            if allowed - total < MIN_CHARACTERS or misses == MOST_MISSES:
                break
            package = "/".join(source.split("/")[:2])
            room = min(allowed - total, largest - of_package[package])
            text = usable(read()) if room >= MIN_CHARACTERS else ""
            key, size = digest(text), len(text.encode("utf-8"))
            misses += size > allowed - total
            if text and key not in seen and size <= room:
                seen.add(key)
                of_package[package] += size
                chosen.append((key, {"text": text, "source": source}))
                total += size
    return [document for _, document in sorted(chosen, key=lambda pair: pair[0])]


def digest(text: str) -> str:
    """The hash of a text without white space, which identifies it."""
    return sha256("".join(text.split()))


def split(documents: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, validation): about 2 % of the bytes, at least one document if there are two."""
    wanted = VALID_SHARE * sum(len(document["text"].encode()) for document in documents)
    valid: list[dict[str, Any]] = []
    taken = 0
    for document in documents[:-1]:
        if valid and taken >= wanted:
            break
        valid.append(document)
        taken += len(document["text"].encode())
    return documents[len(valid) :], valid


def write(path: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Write JSON lines, gzip-compressed if the name ends in .gz; returns counts."""
    lines = b"".join(json.dumps(d, ensure_ascii=False).encode("utf-8") + b"\n" for d in documents)
    data = gzip.compress(lines, 6, mtime=0) if path.endswith(".gz") else lines
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_aside(Path(path), data)
    return {"documents": len(documents), "text_bytes": sum(len(d["text"].encode()) for d in documents)}


def clean(text: str) -> str:
    """Normalize a text: Unix line ends, no control characters, at most two empty lines in a row."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", lines).strip()


Texts: TypeAlias = Iterator[tuple[str, Callable[[], str]]]  # a source, and what reads it


def _documentation() -> Texts:
    """pydoc's topics, and the README files of packages."""
    try:
        from pydoc_data import topics as pydoc

        topics = pydoc.topics
    except ImportError:  # some distributions leave it out
        topics = {}
    for name, text in sorted(topics.items()):
        yield f"pydoc/{name}", partial(str, text)
    yield from _files(_packages_folder(), (".md", ".rst"), "site-packages")


def _standard_library() -> Texts:
    folder = Path(sysconfig.get_path("stdlib"))
    return _files(folder, (".py",), "stdlib", skip=("site-packages", "dist-packages", *TESTS))


def _packages() -> Texts:
    return _files(_packages_folder(), (".py",), "site-packages", skip=TESTS)


def _packages_folder() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _files(folder: Path, suffixes: tuple[str, ...], name: str, skip: tuple[str, ...] = ()) -> Texts:
    """The files below ``folder``, in the order of the hashes of their names."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [entry for entry in folders if entry not in skip and entry != "__pycache__"]
        relative = Path(parent).relative_to(folder).as_posix()
        names += [f"{relative}/{file}" for file in files if file.endswith(suffixes)]
    for path in sorted(names, key=lambda path: sha256(path)):
        yield f"{name}/{path.removeprefix('./')}", partial(_text_of, folder / path)


def _text_of(path: Path) -> str:
    """Of a module its docstrings; "" of a file that is long, or cannot be read."""
    try:
        if path.stat().st_size > 4 * MAX_CHARACTERS:
            return ""
        text = path.read_text("utf-8")
        return docstrings(text) if path.suffix == ".py" else text
    except (OSError, UnicodeError, SyntaxError, ValueError, RecursionError):
        return ""


def docstrings(code: str) -> str:
    """A module's docstring, then name, arguments and docstring of each public class and function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
        module = ast.parse(code)
    return "\n\n\n".join([ast.get_docstring(module) or "", *_described(module, "")])


def _described(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        if len(text) >= MIN_DOCSTRING:
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            yield f"{prefix}{node.name}{arguments}\n\n{text}"
        if isinstance(node, ast.ClassDef):
            yield from _described(node, f"{prefix}{node.name}.")


def usable(text: str) -> str:
    """The text without paragraphs about licences; "" if it is then short or long."""
    paragraphs = clean(text).split("\n\n")
    text = "\n\n".join(paragraph for paragraph in paragraphs if not LICENCE.search(paragraph)).strip()
    return text if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS else ""

"""tools/make_demo_corpus.py: deterministic, clean, without duplicates."""

import gzip
import json

from megatron_ext.data import demo_corpus


def test_same_installation_same_corpus(tmp_path):
    documents = demo_corpus.collect(300_000)
    assert documents == demo_corpus.collect(300_000)
    size = sum(len(document["text"].encode()) for document in documents)
    assert 200_000 < size <= 300_000
    assert len({demo_corpus.digest(document["text"]) for document in documents}) == len(documents)
    train, valid = demo_corpus.split(documents)
    assert len(train) + len(valid) == len(documents) and valid
    path = tmp_path / "deep" / "corpus.jsonl.gz"
    facts = demo_corpus.write(str(path), train)
    assert facts["documents"] == len(train)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == train


def test_cleaning():
    dirty = "a \r\n\tb\x00\x07  \r\n\n\n\n\n\nc\n"
    assert demo_corpus.clean(dirty) == "a\n\tb\n\n\nc"


def test_docstrings_of_a_module():
    """Of what is public and says something, nested classes included; no code."""
    long = (
        "Long enough to say something about what it computes, with its shapes, its units and an example." * 2
    )
    code = f'''"""A module."""
import os
def solve(a, b=1, *, c: int = 2) -> int:
    """{long}"""
    return os.getpid()
def _hidden(a):
    """{long}"""
class Solver:
    """short"""
    class Inner:
        def run(self):
            """{long}"""
'''
    wanted = [
        "A module.",
        f"solve(a, b=1, *, c: int=2)\n\n{long}",
        f"Solver.Inner.run(self)\n\n{long}",
    ]
    assert demo_corpus.docstrings(code).split("\n\n\n") == wanted


def test_licences_are_left_out():
    text = "What this is for. " * 30
    assert demo_corpus.usable(f"{text}\n\nCopyright 2020 The Authors\n\n{text}").count("Copyright") == 0
    assert demo_corpus.usable("Permission is hereby granted, free of charge. " * 50) == ""

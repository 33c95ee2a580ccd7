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

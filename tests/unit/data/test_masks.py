"""A sample's loss mask depends only on that sample, not on earlier reads or on the process."""

import pytest
import torch
from megatron.core.datasets import gpt_dataset

from megatron_ext.data import build_data_loader, build_datasets
from megatron_ext.kernels.documents import shown
from megatron_ext.tokenizer import build_tokenizer
from tests.unit.data import corpora
from tests.unit.data.test_datasets import LENGTHS, arguments

#: An id that the text is full of, taken for the pad token; another ends documents (NullTokenizer's last).
PAD = 7
VOCABULARY = 15


@pytest.fixture
def prefix(tmp_path) -> str:
    return str(corpora.make_dataset(tmp_path / "padded", LENGTHS, vocabulary=VOCABULARY))


def dataset(run):
    tokenizer = build_tokenizer(run.tokenizer)
    tokenizer.pad = PAD
    return build_datasets(run, tokenizer, (40, 0, 0))[0]


def expected(train, number: int) -> dict[str, torch.Tensor]:
    """A sample from its text: pad tokens are not predicted, and id 0 is read in their place, as upstream."""
    text = torch.from_numpy(train._query_document_sample_shuffle_indices(number)[0])
    tokens, labels = text[:-1], text[1:]
    return {
        "tokens": torch.where(tokens == PAD, 0, tokens),
        "labels": torch.where(labels == PAD, 0, labels),
        "loss_mask": (labels != PAD).float(),
        "position_ids": torch.arange(len(tokens)),
    }


@pytest.mark.parametrize("source", ["data", "mock"])
def test_every_sample_has_its_own_mask(prefix, source):
    flags = dict(data_path=[prefix]) if source == "data" else dict(mock_data=True)
    train = dataset(arguments(**flags, split="100,0,0", vocab_size=VOCABULARY))
    masks = set()
    for number in [3, 1, 2, 3, 0]:
        sample, wanted = train[number], expected(train, number)
        assert sample.keys() == wanted.keys()
        assert all(torch.equal(sample[name], wanted[name]) for name in wanted)
        masks.add(tuple(sample["loss_mask"].tolist()))
        for tensor in (sample["tokens"], sample["labels"], sample["loss_mask"]):
            tensor.fill_(-5)  # what a reader does to a sample is no concern of the next one
    assert len(masks) == 4 and tuple([1.0] * 32) not in masks


@pytest.mark.parametrize(
    "resets",
    [{}, {"reset_attention_mask": True}, {"eod_mask_loss": True}, {"reset_position_ids": True}],
    ids=lambda resets: "".join(resets) or "plain",
)
def test_a_sample_does_not_depend_on_those_before_it(prefix, resets):
    run = arguments(data_path=[prefix], split="100,0,0", vocab_size=VOCABULARY, **resets)
    in_order, backwards = dataset(run), dataset(run)
    late = [backwards[number] for number in reversed(range(20))][::-1]
    for number in range(20):
        sample = in_order[number]
        assert all(torch.equal(sample[name], late[number][name]) for name in sample)


def test_documents_end_with_their_last_token(prefix):
    """As in upstream's mask of the same sample, which is not made."""
    train = dataset(
        arguments(data_path=[prefix], split="100,0,0", vocab_size=VOCABULARY, reset_attention_mask=True)
    )
    plain = dataset(arguments(data_path=[prefix], split="100,0,0", vocab_size=VOCABULARY))
    for number in range(20):
        sample = train[number]
        mask, _, _ = gpt_dataset._get_ltor_masks_and_position_ids(
            sample["tokens"], VOCABULARY, False, True, False, True
        )
        assert torch.equal(shown(sample.pop("document_starts")[None])[0], ~mask)
        assert sample.keys() == plain[number].keys()


def test_batches_do_not_depend_on_workers_or_on_where_a_run_begins(prefix):
    run = arguments(data_path=[prefix], split="100,0,0", vocab_size=VOCABULARY)

    def batches(workers: int, consumed: int) -> list[dict]:
        run.data.num_workers = workers
        return list(build_data_loader(dataset(run), run, consumed))

    whole = batches(0, 0)
    for other in (batches(2, 0)[3:], batches(0, 6)):
        for ours, theirs in zip(whole[3:], other, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pad_tokens_in_the_text_are_told_of(prefix, caplog):
    run = arguments(data_path=[prefix], split="100,0,0", vocab_size=VOCABULARY)
    dataset(run)
    assert "pad token (id 7) as text" in caplog.text
    caplog.clear()
    build_datasets(run, build_tokenizer(run.tokenizer), (40, 0, 0))  # a tokenizer without a pad token
    assert not caplog.records

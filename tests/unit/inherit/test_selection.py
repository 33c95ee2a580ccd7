"""Selection of layers, channels and rows: functions from arrays to indices."""

import random

import pytest
import torch

from megatron_ext.inherit import axes, depth, width
from megatron_ext.inherit.axes import Axis
from megatron_ext.inherit.selection import top
from megatron_ext.inherit.vocabulary import Piece, Rows, match, match_tokenizers
from megatron_ext.tokenizer.build import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_ext.tokenizer.pieces import pieces
from tests.unit.inherit import toy
from tests.unit.tokenizer.sample_models import corpus_lines, trained


def test_ends_and_uniform():
    assert depth.ends(10, 5).tolist() == [0, 1, 2, 8, 9]
    assert depth.ends(4, 4).tolist() == [0, 1, 2, 3]
    assert depth.ends(4, 1).tolist() == [0]
    assert depth.uniform(10, 4).tolist() == [0, 3, 6, 9]
    assert depth.uniform(5, 1).tolist() == [0]
    for layers in range(1, 12):
        for keep in range(1, layers + 1):
            assert depth.uniform(layers, keep).unique().numel() == keep
            assert depth.ends(layers, keep).unique().numel() == keep


def test_importance_keeps_what_costs_most_to_skip():
    assert depth.by_importance(torch.tensor([5.0, 2.0, 1.0, 4.0]), 2).tolist() == [0, 3]


def test_listed_layers_are_checked():
    assert depth.listed([3, 0], 4, 2).tolist() == [0, 3]
    with pytest.raises(ValueError, match="names 1 different layers, the target has 2"):
        depth.listed([1, 1], 4, 2)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        depth.listed([1, 4], 4, 2)


def test_of_equal_scores_the_first_win():
    assert top(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2).tolist() == [[1, 2], [0, 1]]


def test_entries_of_units():
    source = toy.config(num_attention_heads=4, num_query_groups=2, kv_channels=2, ffn_hidden_size=5)
    units = torch.tensor([1])
    assert axes.entries(Axis.QKV, units, source).tolist() == list(range(8, 16))  # q q k v, 2 channels each
    assert axes.entries(Axis.HEADS, units, source).tolist() == [4, 5, 6, 7]
    assert axes.entries(Axis.GATE_UP, torch.tensor([0, 3]), source).tolist() == [0, 3, 5, 8]
    sums = axes.unit_sums(Axis.QKV, torch.arange(16.0), source)
    assert sums.tolist() == [sum(range(8)), sum(range(8, 16))]


def test_every_tensor_of_a_model_is_known():
    model = toy.config(add_qkv_bias=True)
    for key, size in model.parameters().items():
        assert len(axes.axes_of(key)) == len(size)
    with pytest.raises(LookupError, match="does not know"):
        axes.axes_of("decoder.layers.0.mlp.router.weight")


@pytest.mark.parametrize("power", [1, 2])
def test_magnitude_is_the_sum_over_all_weights_of_a_unit(power):
    source = toy.config()
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn(size, generator=generator) for key, size in source.parameters().items()}
    scores = width.magnitude(values, values.__getitem__, source, power)
    weight = {key: value.double().abs() ** power for key, value in values.items()}
    layer = "decoder.layers.1."
    fc1, fc2 = weight[layer + "mlp.linear_fc1.weight"], weight[layer + "mlp.linear_fc2.weight"]
    assert scores.ffn[1, 7].item() == pytest.approx((fc1[7] + fc1[48 + 7] + fc2[:, 7]).sum().item(), rel=1e-5)
    rows = slice(2 * 32, 3 * 32)  # group 2 of 4: two query heads, key, value of 8 channels
    group = weight[layer + "self_attention.linear_qkv.weight"][rows].sum()
    group += weight[layer + "self_attention.linear_proj.weight"][:, 32:48].sum()
    assert scores.groups[1, 2].item() == pytest.approx(group.item(), rel=1e-5)
    hidden = sum(
        value.select(number, 3).sum()
        for key, value in weight.items()
        for number, axis in enumerate(axes.axes_of(key))
        if axis is Axis.HIDDEN and value.dim() == 2
    )
    assert scores.hidden[3].item() == pytest.approx(hidden.item(), rel=1e-5)


def test_random_scores_depend_on_the_seed_alone():
    one, same, other = (width.random(toy.config(), seed) for seed in (1, 1, 2))
    assert torch.equal(one.ffn, same.ffn) and not torch.equal(one.hidden, other.hidden)


def test_rows_copy_bit_for_bit_or_take_the_mean():
    weights = torch.randn(4, 3)
    taken = Rows.of([[2], [0, 3], [1]]).take(weights)
    assert torch.equal(taken[0], weights[2]) and torch.equal(taken[2], weights[1])
    torch.testing.assert_close(taken[1], (weights[0] + weights[3]) / 2)


def rows_of(rows: Rows, i: int) -> list[int]:
    """The source ids that target id ``i`` starts from."""
    return rows.ids[rows.starts[i] : rows.starts[i + 1]].tolist()


def test_pieces_are_matched_by_bytes_name_and_role():
    source = [Piece(name, text) for name, text in (("<0x41>", b"A"), ("A", b"A"), ("</s>", b""), ("b", b"b"))]
    wanted = {
        Piece("<end>", b""): [2],  # by its role
        Piece("Ab", b"Ab"): [1, 3],  # by the ids of its text
        Piece("<0x41>", b"A"): [0],  # of the same bytes, the same name first
        Piece("À", b"A"): [1],  # and a byte's piece last
        Piece("</s>", b""): [2],
        Piece("</s>", b"</s>"): [2],  # special there, an added token here
    }
    rows = match(list(wanted), source, {0: 2}, lambda piece: {"Ab": [1, 3]}[piece.name])
    assert [rows_of(rows, i) for i in range(len(wanted))] == list(wanted.values())
    with pytest.raises(ValueError, match="'x'. has no text and no source"):
        match([Piece("x", b"x")], source, {}, lambda piece: [])


def test_tokenizers_are_matched(tmp_path):
    """For a smaller vocabulary every piece exists; for a larger one pieces start from those of their text."""
    tokenizers = []
    for size in (900, 500):
        path = tmp_path / f"{size}.model"
        path.write_bytes(trained(vocab_size=size))
        tokenizers.append(SentencePieceTokenizer(path))
    big, small = tokenizers
    down, up = match_tokenizers(small, big), match_tokenizers(big, small)
    for i in (big.eod, 400, big.vocab_size - 1):
        piece = big.processor.id_to_piece(i)
        ids = up.ids[up.starts[i] : up.starts[i + 1]].tolist()
        assert "".join(small.processor.id_to_piece(j) for j in ids) == piece
    assert (up.counts > 1).any() and (down.counts == 1).mean() > 0.9
    assert down.ids[down.starts[small.eod]] == big.eod


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> tuple[SentencePieceTokenizer, HuggingFaceTokenizer]:
    """The same text learnt by sentencepiece and by a byte-level BPE, as those of Qwen2 and Llama 3."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("families")
    (path / "a.model").write_bytes(trained())
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_level.train_from_iterator(corpus_lines(random.Random(7)), trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|end|>")
    fast.add_tokens(["<sep>"])
    fast.save_pretrained(path / "b")
    return SentencePieceTokenizer(path / "a.model"), HuggingFaceTokenizer(path / "b")


@pytest.mark.parametrize("down", [True, False])
def test_families_of_tokenizers_are_matched_by_bytes(families, down):
    """Every piece starts from pieces with exactly its bytes, from a single piece if the source has it."""
    target, source = families if down else families[::-1]
    rows, texts, theirs = match_tokenizers(target, source), target.token_texts(), source.token_texts()
    for i, text in enumerate(texts):
        if text:
            ids = rows_of(rows, i)
            assert b"".join(theirs[j] for j in ids) == text, pieces(target)[i]
            assert len(ids) == 1 or text not in theirs
    assert rows_of(rows, target.eod) == [source.eod]
    assert (rows.counts > 1).any() and (rows.counts == 1).mean() > 0.4


def test_well_known_pieces_of_both_families(families):
    sentencepiece, byte_level = families
    wanted = {
        families: {
            "▁the": "Ġthe",
            "<0x41>": "A",
            "<0xE4>": "ä",
            "<0x0A>": "Ċ",
            "<sep>": "<sep>",
            "的": "çļĦ",
        },
        families[::-1]: {"Ġthe": "▁the", "Ċ": "<0x0A>", "ä": "<0xE4>", "e": "e", "<sep>": "<sep>"},
    }
    for (target, source), pairs in wanted.items():
        rows, mine, theirs = match_tokenizers(target, source), pieces(target), pieces(source)
        for piece, right in pairs.items():
            assert "".join(theirs[j] for j in rows_of(rows, mine.index(piece))) == right

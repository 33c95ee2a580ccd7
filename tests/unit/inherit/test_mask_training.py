"""Importance on text and learned masks, on toy models."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_ext.inherit import mask_training
from megatron_ext.inherit.calibration import TokenWindows, forward, mean_loss
from megatron_ext.inherit.importance import losses_without_each_layer, taylor
from megatron_ext.inherit.masks import Masks, attached
from tests.unit.inherit import toy

pytestmark = pytest.mark.usefixtures("single_process")
SOURCE = toy.config()
COUNTS = {"hidden": 24, "ffn": 30, "groups": 2, "layers": 3}


def windows(count: int = 6, length: int = 16) -> TokenWindows:
    ids = np.random.default_rng(0).integers(0, 100, count * length + 1)
    return TokenWindows.of([ids.tolist()], length)


def frozen():
    return toy.model(SOURCE).requires_grad_(False)


def test_windows_predict_every_token_once():
    text = windows(3, 4)
    assert text.tokens.shape == (3, 5) and text.counted.all()
    short = TokenWindows.of([[5, 6], [7]], 4)
    assert short.tokens.tolist() == [[5, 6, 7, 0, 0]] and short.counted.tolist() == [
        [True, True, False, False]
    ]
    shares = [batch.tokens for rank in range(2) for batch in windows(5, 4).batches(2, rank, 2)]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == sorted(windows(5, 4).tokens[:, 0].tolist())


def test_mean_loss_is_the_models():
    model, text = frozen(), windows()
    ids = torch.from_numpy(text.tokens)
    logits = toy.logits(model, ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    token_bytes = np.full(128, 2, dtype=np.int32)
    loss = mean_loss(model, text, 4, token_bytes)
    assert loss.nats == pytest.approx(expected.item(), rel=1e-5) and loss.tokens == 96
    assert loss.bits_per_byte == pytest.approx(loss.nats / np.log(2) / 2, rel=1e-6)


def test_skipping_a_layer_is_a_model_without_it():
    model, text = frozen(), windows()
    bytes_of = np.ones(128, dtype=np.int32)
    seen = []
    losses = losses_without_each_layer(
        model, SOURCE, lambda: mean_loss(model, text, 6, bytes_of).nats, seen.append
    )
    shorter = dataclasses.replace(SOURCE, num_layers=2)
    selection = dataclasses.replace(toy.random_selection(SOURCE, SOURCE, 0), layers=torch.tensor([0, 2]))
    small = toy.sliced(model, SOURCE, shorter, selection)
    assert losses[1].item() == pytest.approx(mean_loss(small, text, 6, bytes_of).nats, rel=1e-5)
    assert seen == [0, 1, 2]


def test_taylor_is_the_slope_of_the_loss():
    """dL/dmask of a unit by finite differences."""
    model, batch = frozen(), next(windows().batches(6))
    worth = taylor(model, SOURCE, torch.arange(3), [batch])
    masks, step = Masks.ones(SOURCE), 1e-2
    for name, at in (("hidden", 5), ("ffn", (1, 7)), ("groups", (2, 3)), ("layers", 0)):
        around = []
        for sign in (1, -1):
            changed = getattr(masks, name).clone()
            changed[at] += sign * step
            with attached(model, dataclasses.replace(masks, **{name: changed})), torch.no_grad():
                around.append(forward(model, batch).double().mean().item())
        slope = (around[0] - around[1]) / (2 * step)
        assert getattr(worth, name)[at].item() == pytest.approx(slope**2, rel=0.05, abs=1e-8), name


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01])
def test_relaxed_masks_sum_to_the_count(temperature):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    mask = mask_training.relaxed(logits, 20, temperature)
    torch.testing.assert_close(mask.sum(-1), torch.full((3,), 20.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(mask.argsort(stable=True), logits.argsort(stable=True)) or temperature < 0.1
    (mask * torch.arange(1, 51)).sum().backward()
    assert (logits.grad >= 0).all() and (logits.grad > 0).any()
    assert mask_training.relaxed(logits, 50, temperature).eq(1).all()


def test_cold_masks_are_hard():
    logits = torch.arange(50.0).expand(2, 50)
    torch.testing.assert_close(mask_training.relaxed(logits, 20, 0.01), mask_training.hard(logits, 20))
    assert mask_training.hard(logits, 20).sum(-1).tolist() == [20.0, 20.0]


def trained(
    training: mask_training.MaskTraining, stop: int | None = None, state: dict | None = None
) -> mask_training.MaskState:
    """Masks of the toy after ``stop`` steps, from ``state`` if it is given."""
    model, batches = frozen(), list(windows(12).batches(4))
    first = taylor(model, SOURCE, torch.arange(3), batches)
    learned = mask_training.begin(first)
    if state is not None:
        learned.restore(state)

    def steps(start: int):
        for step in range(start, training.steps if stop is None else stop):
            yield [batches[step % 3], batches[(step + 1) % 3]]

    mask_training.train(model, COUNTS, learned, steps, training, lambda now: None)
    return learned


def test_masks_learn_resume_and_repeat():
    training = mask_training.MaskTraining(steps=40, patience=100, learning_rate=0.1)
    whole, again = trained(training), trained(training)
    assert whole.step == 40 and whole.losses == again.losses
    resumed = trained(training, state=trained(training, stop=15).state())
    assert resumed.losses == whole.losses and resumed.tokens == whole.tokens == 40 * 8 * 16
    for name, logits in whole.logits.items():
        assert torch.equal(logits, resumed.logits[name])
    assert np.mean(whole.losses[-8:]) < np.mean(whole.losses[:8]) - 0.05


def kept(learned: mask_training.MaskState) -> float:
    """The loss of the source with the units that the logits keep, and no others."""
    model = frozen()
    masks = Masks(
        **{name: mask_training.hard(logits, COUNTS[name]) for name, logits in learned.logits.items()}
    )
    with attached(model, masks, hidden_kept=COUNTS["hidden"]):
        return mean_loss(model, windows(12), 6, np.ones(128, dtype=np.int32)).nats


def test_the_choice_gets_better():
    """On the text that it was trained on, against the first scores that it started from."""
    first = trained(mask_training.MaskTraining(steps=40), stop=0)
    assert (
        kept(trained(mask_training.MaskTraining(steps=40, patience=100, learning_rate=0.1)))
        < kept(first) - 0.05
    )


def test_masks_stop_when_the_choice_rests():
    still = trained(mask_training.MaskTraining(steps=40, patience=5, learning_rate=1e-9))
    assert still.step == 5

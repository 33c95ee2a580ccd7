"""Log-likelihoods: those of the plain logits, the same at every layout, computed again to the last bit."""

import random

import pytest
import torch

from megatron_ext.evaluation.requests import Request, is_truncated, windows
from megatron_ext.evaluation.scoring import Scorer
from tests.helpers.models import VOCABULARY, positions, small_config, small_model
from tests.helpers.parallel import Layout

LONGEST = 40


def some_requests(count: int = 37) -> list[Request]:
    """Of many lengths; some share what they read, some are too long, one is predicted in several windows."""
    draw = random.Random(1)
    ids = lambda n: tuple(draw.randrange(VOCABULARY) for _ in range(n))  # noqa: E731
    requests = [Request(ids(draw.randint(1, 30)), ids(draw.randint(1, 8))) for _ in range(count)]
    shared = ids(9)
    requests += [Request(shared, ids(1)) for _ in range(4)]
    return [*requests, Request(ids(70), ids(5)), Request(ids(3), ids(100))]


def expected(model, request: Request) -> tuple[float, bool]:
    """From the logits of each window alone."""
    logprob, greedy = 0.0, True
    for window in windows(request, LONGEST):
        ids = torch.tensor([window.input])
        logits = model(ids, positions(ids), None)[0, -len(window.targets) :].double()
        logprob += logits.log_softmax(-1)[range(len(window.targets)), window.targets].sum().item()
        greedy = greedy and logits.argmax(-1).tolist() == list(window.targets)
    return logprob, greedy


def score(layout: Layout, **changes):
    config = small_config(num_layers=4, **changes)
    model = [chunk.eval() for chunk in small_model(config, tied=True)]
    scorer = Scorer(model, LONGEST, tokens_at_once=256)
    return scorer(some_requests())


@torch.no_grad()
def test_equals_the_logits(single_process):
    model = small_model(small_config(), tied=True)[0].eval()
    greedy = model(ids := torch.tensor([[5, 6, 7]]), positions(ids), None)[0, -1].argmax().item()
    requests = [*some_requests(), Request((5, 6, 7), (greedy,))]
    scorer = Scorer([model], LONGEST, tokens_at_once=256)
    found = scorer(requests)
    wanted = [expected(model, request) for request in requests]
    assert [one.logprob for one in found] == pytest.approx([one for one, _ in wanted], abs=1e-5)
    assert [one.greedy for one in found] == [one for _, one in wanted]
    assert found[-1].greedy
    assert sum(is_truncated(request, LONGEST) for request in some_requests()) == 2  # the last two


@pytest.mark.parametrize(
    "layout, sequence_parallel",
    [(Layout(tp=2), False), (Layout(tp=2), True), (Layout(pp=2), False), (Layout(dp=2), False),
     (Layout(pp=2, vpp=2), False), (Layout(tp=2, pp=2), False)],
    ids=str,
)  # fmt: skip
def test_equal_at_every_layout(pool, layout, sequence_parallel):
    alone = pool.run(Layout(), score, Layout())[0]
    for found in pool.run(layout, score, layout, sequence_parallel=sequence_parallel):
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in alone], abs=1e-4)
        assert [one.greedy for one in found] == [one.greedy for one in alone]


def score_in_parts() -> list:
    """All at once, and with a memory that forgets every other pass."""

    class Half(dict):
        def recall(self, keys):
            return {key: self[key] for key in keys[::2] if key in self}

        keep = dict.__setitem__

    model = [chunk.eval() for chunk in small_model(small_config())]
    memory = Half()
    return [Scorer(model, LONGEST, tokens_at_once=256, memory=memory)(some_requests()) for _ in range(2)]


def test_scored_again_to_the_last_bit(pool):
    for first, again in pool.run(Layout(dp=2), score_in_parts):
        assert first == again

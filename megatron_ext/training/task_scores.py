"""``--eval-tasks``: what the model knows, while it is trained.

Each benchmark is asked in its cloze form (evaluation/forms.py), whose bits per byte of the right answers fall
long before any accuracy leaves chance. The numbers are those that tools/evaluate.py gives for a checkpoint of
the same iteration; at one layout they are equal to the last bit.
"""

from functools import partial

from torch import nn

from megatron_ext.config import RunConfig
from megatron_ext.evaluation.documents import documents
from megatron_ext.evaluation.forms import Item, item_of, task_name, values_of
from megatron_ext.evaluation.requests import Encoder, Request
from megatron_ext.evaluation.scoring import Scorer
from megatron_ext.evaluation.statistics import bootstrap_error, mean
from megatron_ext.platform.collective import on_every_rank
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training.callbacks import Callback, State
from megatron_ext.training.state import StepResult, TaskScore
from megatron_ext.training.step import evaluation_mode, parameters_in_place


class TaskScores(Callback):
    """Scores the benchmarks before the first step, every ``--eval-tasks-interval`` and at the end.

    Raises:
        RunError: on every rank, if questions are missing or damaged.
    """

    def __init__(self, run: RunConfig, tokenizer: Tokenizer, model: list[nn.Module]) -> None:
        self.run, self.model, self.scored = run, model, -1
        validation = run.validation
        encoder = Encoder(tokenizer)
        self.items: dict[str, list[Item]] = {}
        self.requests: dict[str, list[Request]] = {}

        def read() -> None:
            for name in validation.eval_tasks or ():
                found = documents(name, validation.eval_tasks_data_dir or "")[: validation.eval_tasks_limit]
                items = [item_of(document, "cloze") for document in found]
                self.items[task_name(name, "cloze")] = items
                self.requests[task_name(name, "cloze")] = [
                    encoder.pair(item.query, choice) for item in items for choice in item.choices
                ]

        on_every_rank(read)

    def start(self, state: State) -> None:
        if state.progress.iteration == 0:
            self._score(state)

    def after_step(self, state: State, result: StepResult) -> None:
        interval = self.run.validation.eval_tasks_interval
        if interval and state.progress.iteration % interval == 0:
            self._score(state)

    def end(self, state: State) -> None:
        validation, iteration = self.run.validation, state.progress.iteration
        over = validation.skip_train or iteration >= self.run.training.train_iters  # and not stopped
        if over and self.scored != iteration:
            self._score(state)

    def _score(self, state: State) -> None:
        """Score all benchmarks and tell the callbacks; a collective call."""
        iteration = self.scored = state.progress.iteration
        scores: dict[str, dict[str, TaskScore]] = {}
        with parameters_in_place(self.model, self.run.parallel), evaluation_mode(self.model):
            for name, requests in self.requests.items():
                note = partial(_sign, state, name, iteration)
                note(0)
                scorer = Scorer(self.model, self.run.model.max_position_embeddings, note=note)
                logprobs = iter([score.logprob for score in scorer(requests)])
                rows = [
                    values_of(item, "cloze", [next(logprobs) for _ in item.choices])
                    for item in self.items[name]
                ]
                columns = {metric: [row[metric] for row in rows] for metric in rows[0]}
                scores[name] = {
                    metric: TaskScore(mean(values), bootstrap_error(values))
                    for metric, values in columns.items()
                }
        state.callbacks("after_scoring", state, scores)


def _sign(state: State, name: str, iteration: int, done: int) -> None:
    state.note(f"scoring {name}", iteration)

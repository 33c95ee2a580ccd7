"""Our model as lm-evaluation-harness asks it.

Every rank of the job calls the harness alike, with all requests, and is a world of one to it: sharing the
work is the scorer's.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from megatron.core import parallel_state

from megatron_ext.common.files import sha256
from megatron_ext.evaluation.documents import EvaluationError
from megatron_ext.evaluation.requests import Encoder, Request, Score, is_truncated
from megatron_ext.evaluation.scoring import Scorer
from megatron_ext.harness.cache import ScoreFile
from megatron_ext.harness.load import Opened
from megatron_ext.inference import Sampling, generate
from megatron_ext.platform.collective import gather, on_first_rank, rank

#: Of a generated answer, as in the harness's own models.
_MAX_NEW_TOKENS = 256


class PanguLM(TemplateLM):
    """Scores and generates with an opened model; every call is collective.

    ``expect`` is told how many requests come.

    Attributes:
        truncated: by task, the numbers of the questions that lost the beginning of their context.
    """

    def __init__(
        self,
        opened: Opened,
        scorer: Scorer,
        kept: ScoreFile | None = None,
        expect: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__()
        self.opened, self.scorer, self.kept, self.expect = opened, scorer, kept, expect
        self.encoder = Encoder(opened.tokenizer, opened.start)
        self.truncated: dict[str, set[int]] = defaultdict(set)

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self.opened.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What is read where there is no context."""
        return self.encoder.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text."""
        return list(self.encoder.encode(string))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether it is the greedy one."""
        scores = self._scores(requests, [self.encoder.pair(*request.args) for request in requests])
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats."""
        scores = self._scores(requests, [self.encoder.rolling(*request.args) for request in requests])
        return [score.logprob for score in scores]

    def _scores(self, instances: Sequence[Instance], requests: Sequence[Request]) -> list[Score]:
        """Task by task, so that a task's numbers do not depend on what else is scored."""
        scores: list[Score] = [Score(0.0, True)] * len(requests)
        self.expect(len(requests))
        for task in dict.fromkeys(instance.task_name for instance in instances):
            places = [i for i, instance in enumerate(instances) if instance.task_name == task]
            self.truncated[task] |= {
                instances[i].doc_id for i in places if is_truncated(requests[i], self.scorer.longest)
            }
            for place, score in zip(places, self.scorer([requests[i] for i in places]), strict=True):
                scores[place] = score
        return scores

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        found = self.scorer([Request(tuple(context), tuple(rest)) for _, context, rest in requests])
        return [(score.logprob, score.greedy) for score in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to a stop or the end of a document.

        Raises:
            EvaluationError: the model is divided among pipeline stages, which do not generate.
        """
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise EvaluationError(
                f"--pipeline-model-parallel-size: {requests[0].task_name} generates text, which needs 1"
            )
        keys = [sha256(f"{self.opened.identity} {request.args!r}") for request in requests]
        known = on_first_rank(lambda: {key: self.kept.text(key) for key in keys} if self.kept else {})
        own = parallel_state.get_data_parallel_rank()
        all_of = parallel_state.get_data_parallel_world_size()
        texts = {}
        self.expect(len(requests))
        for number, (key, request) in enumerate(zip(keys, requests, strict=True)):
            if number % all_of == own and known.get(key) is None:
                texts[key] = self._generated(*request.args)
                if self.kept and rank() == 0:
                    self.kept.keep(key, texts[key])
            self.scorer.note(1)
        found = {key: text for key, text in known.items() if text is not None}
        for part in gather(texts):
            found |= part
        return [found[key] for key in keys]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        longest = self.opened.run.model.max_position_embeddings
        new = min(int(settings.get("max_gen_toks", _MAX_NEW_TOKENS)), longest - 1)
        prompt = list(self.encoder.encode(context))[-(longest - new) :] or [self.prefix_token_id]
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        tokenizer, ids, text = self.opened.tokenizer, [], ""
        for token in generate(
            self.opened.model, prompt, new, Sampling(temperature), tokenizer.vocab_size, tokenizer.eod
        ):
            if token == tokenizer.eod:
                break
            ids.append(token)
            text = tokenizer.detokenize(ids)
            if found := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(found)]
        return text

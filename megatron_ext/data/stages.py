"""The stages of ``--data-stages``: what a run reads from which point on.

The file is a JSON list of objects, in the order of the run:

    name            what the log calls the stage; by default its number
    from_iteration  the iterations, or
    from_sample     the samples, after which it begins; the first stage has neither
    blend           words as of --data-path, or a list of {"prefix": ..., "weight": ...}, in which "tokens"
                    that the stage is to read of a source may take the place of the weight
    seq_length      by default that of --seq-length
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.data import is_number
from megatron_ext.data.errors import DatasetError
from megatron_ext.data.text.records import repeated

#: If all sources of a stage have tokens, their sum may differ from those of the stage by this share.
TOLERANCE = 0.01
_FIELDS = ("name", "from_iteration", "from_sample", "blend", "seq_length")


@dataclass(frozen=True)
class Source:
    """A dataset of a stage, with a weight or the tokens that the stage reads of it, or alone with neither."""

    prefix: str
    weight: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Stage:
    """One stage, as in the file."""

    name: str
    blend: tuple[Source, ...]
    from_iteration: int | None = None
    from_sample: int | None = None
    seq_length: int | None = None

    def shares(self, tokens: int) -> list[float]:
        """The share of each source in a stage of so many tokens; sources with weights divide what is left.

        Raises:
            DatasetError: the sources' tokens do not fit.
        """
        fixed = sum(source.tokens or 0 for source in self.blend)
        weights = sum(source.weight or 0 for source in self.blend)
        if len(self.blend) == 1:
            weights = weights or 1.0
            return [1.0] if not fixed else self._all_by_tokens(fixed, tokens)
        if not weights:
            return self._all_by_tokens(fixed, tokens)
        if fixed >= tokens:
            raise DatasetError(
                f"stage {self.name}: blend: {fixed:,.0f} of its {tokens:,} tokens are given to sources, "
                "which leaves none for those with a weight"
            )
        rest = (tokens - fixed) / tokens / weights
        return [s.tokens / tokens if s.tokens else (s.weight or 0) * rest for s in self.blend]

    def _all_by_tokens(self, fixed: float, tokens: int) -> list[float]:
        if abs(fixed - tokens) > TOLERANCE * tokens:
            raise DatasetError(
                f"stage {self.name}: blend: the sources' tokens add up to {fixed:,.0f}, and the stage has "
                f"{tokens:,}; give one of them a weight instead, to take what is left"
            )
        return [(source.tokens or 0) / fixed for source in self.blend]

    def words(self, tokens: int) -> list[str]:
        """The blend of a stage of so many tokens, as ``--data-path`` has it."""
        if len(self.blend) == 1 and self.blend[0].weight is None:
            self.shares(tokens)
            return [self.blend[0].prefix]
        shares = self.shares(tokens)
        if all(source.tokens is None for source in self.blend):
            shares = [source.weight or 0 for source in self.blend]  # as they were given
        pairs = zip(shares, self.blend, strict=True)
        return [word for share, source in pairs for word in (repr(share), source.prefix)]

    def described(self) -> dict[str, Any]:
        """What a checkpoint remembers of it; data may lie elsewhere later."""
        blend = [asdict(source) | {"prefix": Path(source.prefix).name} for source in self.blend]
        return asdict(self) | {"blend": blend}


def read_stages(path: str) -> list[Stage]:
    """The stages of a file.

    Raises:
        DatasetError: with every problem of the file.
    """
    stages, problems = parse(path)
    if problems:
        raise DatasetError("; ".join(problems))
    return stages


def parse(path: str) -> tuple[list[Stage], list[str]]:
    """(stages, problems) of a file; each problem names the file, the stage and the field."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_name_twice)
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"--data-stages {path}: cannot be read ({error})"]
    if not isinstance(entries, list) or not entries:
        return [], [f"--data-stages {path}: must be a JSON list of stages, such as {EXAMPLE}"]
    stages, problems = [], []
    for number, entry in enumerate(entries, 1):
        found: list[str] = []
        stage = _stage(entry, number, found.append)
        problems += [f"--data-stages {path}: stage {number}: {problem}" for problem in found]
        stages += [stage] if stage is not None and not found else []
    names = [stage.name for stage in stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"--data-stages {path}: name: two stages are called {name!r}")
    return stages, problems


EXAMPLE = (
    '[{"blend": "0.7 web 0.3 code"}, {"name": "annealing", "from_iteration": 800, "seq_length": 2048, '
    '"blend": [{"prefix": "web", "weight": 1}, {"prefix": "books", "tokens": 2e6}]}]'
)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated(pairs)) is not None:
        raise ValueError(f"{twice!r} is given twice in one object")
    return dict(pairs)


def _stage(entry: Any, number: int, say: Callable[[str], None]) -> Stage | None:
    if not isinstance(entry, dict):
        say(f"must be an object, such as those in {EXAMPLE}")
        return None
    for unknown in sorted(entry.keys() - set(_FIELDS)):
        say(f"{unknown}: unknown; a stage has {', '.join(_FIELDS)}")
    name = entry.get("name", str(number))
    if not isinstance(name, str) or not name:
        say(f"name: must be text, got {name!r}")
    whole: dict[str, int | None] = {}
    for field, least in (("from_iteration", 0), ("from_sample", 0), ("seq_length", 1)):
        value = entry.get(field)
        if value is not None and (type(value) is not int or value < least):
            say(f"{field}: must be a whole number of at least {least}, got {value!r}")
        whole[field] = value
    begins = [field for field in ("from_iteration", "from_sample") if whole[field] is not None]
    if number == 1 and any(whole[field] for field in begins):
        say(f"{begins[0]}: the first stage begins with the run: leave it out")
    if number > 1 and len(begins) != 1:
        say("give either from_iteration or from_sample")
    if "blend" not in entry:
        say("blend: is missing: give words as of --data-path, or a list of objects")
        return None
    return Stage(name, _blend(entry["blend"], say), **whole)


def _blend(value: Any, say: Callable[[str], None]) -> tuple[Source, ...]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        say(f"blend: must be words as of --data-path, or a list of objects with a prefix each, got {value!r}")
        return ()
    if all(isinstance(word, str) for word in words):
        return sources_of_words(words, say)
    sources = [_source(entry, place, say) for place, entry in enumerate(words, 1)]
    found = tuple(source for source in sources if source is not None)
    if len(found) == len(sources) > 1 and any(s.weight is None and s.tokens is None for s in found):
        say("blend: give each of several sources a weight or tokens")
    return found


def sources_of_words(words: Sequence[str], say: Callable[[str], None]) -> tuple[Source, ...]:
    """The sources of a blend as ``--data-path`` has it; problems are given to ``say``."""
    if len(words) == 1:
        return (Source(words[0]),)
    weights, prefixes = words[::2], words[1::2]
    if len(weights) != len(prefixes) or not all(map(is_number, weights)) or any(map(is_number, prefixes)):
        say(f"blend: give a weight before every prefix, got {' '.join(words)!r}")
        return ()
    for weight in weights:
        if not _is_amount(float(weight)):
            say(f"blend: weights must be above 0, got {weight}")
    return tuple(Source(prefix, float(weight)) for weight, prefix in zip(weights, prefixes, strict=True))


def _source(entry: Any, place: int, say: Callable[[str], None]) -> Source | None:
    where = f"blend, source {place}"
    if not isinstance(entry, dict) or not isinstance(entry.get("prefix"), str) or not entry["prefix"]:
        say(f'{where}: must be an object with a "prefix", got {entry!r}')
        return None
    for unknown in sorted(entry.keys() - {"prefix", "weight", "tokens"}):
        say(f"{where}: {unknown}: unknown; a source has prefix, and weight or tokens")
    amounts = {field: entry[field] for field in ("weight", "tokens") if entry.get(field) is not None}
    if len(amounts) == 2:
        say(f"{where}: give a weight or tokens, not both")
    for field, value in amounts.items():
        if not _is_amount(value):
            say(f"{where}: {field}: must be a number above 0, got {value!r}")
    return Source(entry["prefix"], **amounts)


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0

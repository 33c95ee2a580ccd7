"""The types of rules."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_ext.config import RunConfig

#: Destination -> value of the flags on the command line.
Typed = Mapping[str, Any]
#: One sentence each.
Problems = Iterator[str]
Rule = Callable[[RunConfig, Typed], Problems]

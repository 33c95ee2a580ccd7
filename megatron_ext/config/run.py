"""The whole configuration of a run, by concern, made once from the command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_ext.config.data import DataConfig, RoundsConfig, TokenizerConfig, ValidationConfig
from megatron_ext.config.distillation import DistillationConfig
from megatron_ext.config.layers import (
    FusionConfig,
    GraphConfig,
    InitConfig,
    LayersConfig,
    PrecisionConfig,
    RecomputeConfig,
)
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.output import CheckpointConfig, LoggingConfig, ProfilingConfig
from megatron_ext.config.parallel import ParallelConfig, ProcessConfig
from megatron_ext.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig


@dataclass(kw_only=True)
class RunConfig:
    """Each field is a concern and a section of ``--help``; a name belongs to only one of them."""

    init: InitConfig
    model: ModelConfig
    layers: LayersConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    validation: ValidationConfig
    rounds: RoundsConfig
    distillation: DistillationConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig
    precision: PrecisionConfig
    graphs: GraphConfig
    fusion: FusionConfig
    process: ProcessConfig
    profiling: ProfilingConfig

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration with these values, by name; other fields have their default.

        The model is a draft: its :meth:`ModelConfig.problems` are reported together with others.
        """
        parts: dict[str, Any] = {name: {} for name in concerns()}
        for name, value in values.items():
            parts[concern_of(name)][name] = value
        made: dict[str, Any] = {
            name: kind(**parts[name]) for name, kind in concerns().items() if name != "model"
        }
        return cls(model=ModelConfig.draft(**parts["model"]), **made)

    def flat(self) -> dict[str, Any]:
        """Name -> value of every field, as in Megatron-LM's arguments."""
        return {name: value for concern in concerns() for name, value in vars(getattr(self, concern)).items()}

    @property
    def samples_at_once(self) -> int:
        """Samples of one micro batch over all data parallel ranks."""
        return self.training.micro_batch_size * self.parallel.data_parallel_size

    def get(self, name: str) -> Any:
        """The value of the field ``name``."""
        return getattr(getattr(self, concern_of(name)), name)

    def but(self, **values: Any) -> RunConfig:
        """A copy with some values replaced, by name."""
        changed: dict[str, Any] = {}
        for name, value in values.items():
            concern = concern_of(name)
            part = changed.get(concern, getattr(self, concern))
            changed[concern] = dataclasses.replace(part, **{name: value})
        return dataclasses.replace(self, **changed)

    def change_model(self, **values: Any) -> None:
        """Replace values of the model; the result is a draft."""
        self.model = ModelConfig.draft(**vars(self.model) | values)


@cache
def concerns() -> dict[str, type]:
    """Field of RunConfig -> its class."""
    return typing.get_type_hints(RunConfig)


@cache
def _places() -> dict[str, str]:
    return {field.name: name for name, kind in concerns().items() for field in dataclasses.fields(kind)}


def is_named(name: str) -> bool:
    """Whether any concern has a field ``name``."""
    return name in _places()


def concern_of(name: str) -> str:
    """The field of RunConfig whose concern has the field ``name``.

    Raises KeyError for an unknown name.
    """
    return _places()[name]

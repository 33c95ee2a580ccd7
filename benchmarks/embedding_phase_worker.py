"""pretrain_pangu_pro.py with everything frozen that has no vocabulary axis; part of embedding_phase.py."""

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_ext import platform

platform.activate()

import pretrain_pangu_pro
from megatron_ext.inherit.axes import Axis, axes_of
from megatron_ext.inherit.calibration import checkpoint_name
from megatron_ext.training import setup


def vocabulary_alone(build: Any) -> Any:
    """``build_model`` with the other parameters frozen."""

    def built(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(Axis.VOCABULARY in axes_of(checkpoint_name(name)))
        return model

    return built


if __name__ == "__main__":
    setup.build_model = vocabulary_alone(setup.build_model)
    pretrain_pangu_pro.main()

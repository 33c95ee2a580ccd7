"""The model configuration: Megatron-Core's TransformerConfig and the PanGu-pi options."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class PanguProConfig(TransformerConfig):
    """TransformerConfig with the two PanGu-pi modules; with both off it is Megatron-Core's own."""

    series_activation_order: int = 0
    """Number n of terms of the series informed activation in the FFN; 0 keeps the plain activation."""

    augmented_shortcuts: int = 0
    """Number T of augmented shortcuts around the attention; 0 keeps the plain residual."""

    augmented_shortcut_reduction: int = 32
    """Reduction r of an augmented shortcut's bottleneck: hidden -> hidden/r -> hidden."""

    pangu_init: Literal["identity", "random"] = "identity"
    """identity: the modules start without effect, so that a plain model's output is kept; random:
    they start like any other weight."""

    def __post_init__(self):
        super().__post_init__()
        if self.series_activation_order and not self.gated_linear_unit:
            raise ValueError("--series-activation-order acts on the gate of SwiGLU: add --swiglu")
        if self.augmented_shortcuts and self.hidden_size % self.augmented_shortcut_reduction:
            raise ValueError(
                f"--hidden-size {self.hidden_size} is not divisible by "
                f"--augmented-shortcut-reduction {self.augmented_shortcut_reduction}"
            )

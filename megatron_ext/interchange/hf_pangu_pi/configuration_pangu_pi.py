"""Configuration of a PanGu-pi model: Llama's, and the sizes of the two pi modules."""

from transformers import LlamaConfig


class PanguPiConfig(LlamaConfig):
    """LlamaConfig and four settings more.

    Args:
        series_activation_order: terms n of the series informed activation in the MLP; 0: plain SiLU.
        augmented_shortcuts: augmented shortcuts T beside the attention; 0: none.
        augmented_shortcut_reduction: reduction r of a shortcut's bottleneck, hidden -> hidden/r -> hidden.
        qkv_bias: whether queries, keys and values have a bias (the output projection never has one).
    """

    model_type = "pangu_pi"

    def __init__(
        self,
        series_activation_order: int = 0,
        augmented_shortcuts: int = 0,
        augmented_shortcut_reduction: int = 32,
        qkv_bias: bool = False,
        **kwargs: object,
    ) -> None:
        self.series_activation_order = series_activation_order
        self.augmented_shortcuts = augmented_shortcuts
        self.augmented_shortcut_reduction = augmented_shortcut_reduction
        self.qkv_bias = qkv_bias
        super().__init__(**kwargs)

"""PanGu-pi on Megatron-Core: the two modules, the layer specs, presets, initial weights, kernels."""

"""The training step's operators, each beside its formula in plain PyTorch."""

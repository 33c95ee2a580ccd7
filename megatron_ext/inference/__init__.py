"""Text generation with a trained model."""

from megatron_ext.inference.generate import Sampling, generate
from megatron_ext.inference.load import load_for_inference

__all__ = ["Sampling", "generate", "load_for_inference"]

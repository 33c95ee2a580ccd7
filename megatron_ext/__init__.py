"""PanGu-pi Pro in Megatron-Core: everything from raw text to an evaluated small language model."""

__version__ = "0.1.0"

from megatron_ext import platform

platform.install()

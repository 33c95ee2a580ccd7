"""The former place of ``megatron_ext.checkpoint``, for scripts that import it from here."""

import sys

from megatron_ext import checkpoint

sys.modules[__name__] = checkpoint

"""The command line: Megatron-LM's flags, defaults and rules, and PanGu-pi's own.

``parse_args()`` gives a ``RunConfig``: the flags of ``megatron_ext.config``, what a checkpoint says of its
model (``from_checkpoint``), what follows from other flags (``defaults``), checked by the rules of
``validate``.
"""

from megatron_ext.arguments.parser import make_parser, parse_args

__all__ = ["make_parser", "parse_args"]

"""The command line: Megatron-LM's flags, defaults and rules, and PanGu-pi's own.

``parse_args()`` returns a ``RunConfig``: the flags of ``megatron_ext.config``, completed by the model of a
checkpoint (``from_checkpoint``) and by values derived from other flags (``defaults``), and checked by the
rules of ``validate``.
"""

from megatron_ext.arguments.parser import make_parser, parse_args

__all__ = ["make_parser", "parse_args"]

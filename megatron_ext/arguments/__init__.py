"""The command line: Megatron-LM's flags, defaults and rules, and PanGu-pi's own.

``parse_args()`` gives one flat namespace with Megatron-LM's names. ``factory`` makes flags from
dataclass fields, ``groups`` holds the fields, ``derive`` fills in what follows from other flags,
``validate`` holds the rules, and ``configs`` makes Megatron-Core's configuration objects.
"""

from megatron_ext.arguments.parser import make_parser, parse_args

__all__ = ["make_parser", "parse_args"]

"""Properties of single layers: every N-th layer has one, or a list has a 0 or 1 for each layer.

``--no-rope-freq`` and ``--window-attn-skip-freq`` accept both, as in Megatron-LM, which evaluates a list as
Python (megatron/training/arguments.py:no_rope_freq_type); here it is parsed.
"""

import argparse
import ast

Pattern = int | tuple[int, ...]
#: Limits the memory that a product in the list can take.
_LONGEST = 1 << 12


def pattern(text: str) -> Pattern:
    """``4``, ``[0,0,0,1]``, or sums and products of lists such as ``([0]*3+[1])*9``."""
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a number, nor a list such as [0,0,0,1] or ([0]*3+[1])*9"
        ) from None
    return found if isinstance(found, int) else tuple(found)


def _value(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int() as number) if type(number) is int:
            return number
        case ast.List(elts=nodes):
            return [_number(entry) for entry in nodes]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [*_list(left), *_list(right)]
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            entries, times = _list(left), _number(right)
            if len(entries) * times > _LONGEST:
                raise ValueError
            return entries * times
    raise ValueError


def _number(node: ast.expr) -> int:
    if not isinstance(found := _value(node), int):
        raise ValueError
    return found


def _list(node: ast.expr) -> list[int]:
    if not isinstance(found := _value(node), list):
        raise ValueError
    return found


def window(text: str) -> tuple[int, ...]:
    """``511,0`` or ``(511,0)``, as Megatron-LM's ``tuple_type``."""
    try:
        return tuple(int(part) for part in text.strip("() ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not LEFT,RIGHT, such as 511,0") from None


def every(freq: Pattern, layers: int) -> tuple[int, ...]:
    """1 for every ``freq``-th of the layers, the last of each ``freq``; or the list as it is."""
    if isinstance(freq, int):
        return tuple(int((layer + 1) % freq == 0) for layer in range(layers))
    return freq

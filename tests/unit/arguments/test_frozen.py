"""The command line and the args of a checkpoint are a contract: neither changes by accident.

An intended change is recorded by ``python tests/unit/arguments/test_frozen.py`` and shows in the diff of
flags.json.
"""

import argparse
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from megatron_ext.arguments.parser import make_parser, read_args  # noqa: E402
from megatron_ext.common.flags import default_of  # noqa: E402
from megatron_ext.config import options  # noqa: E402

FROZEN = Path(__file__).with_name("flags.json")
SMALLEST = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 1 --train-iters 1 --lr 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 7"
)


def flags() -> dict[str, dict]:
    """First spelling of each flag -> everything that a user may rely on."""
    described = {}
    for action in make_parser()._actions:
        if action.dest == "help":
            continue
        default = default_of(options()[action.dest])
        described[action.option_strings[0]] = {
            "destination": action.dest,
            "spellings": list(action.option_strings),
            "default": getattr(default, "name", default),
            "kind": _kind(action),
            "choices": action.choices and [str(choice) for choice in action.choices],
        }
    return described


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return f"sets {action.const}"
    return f"{getattr(action.type, '__name__', 'str')} x {action.nargs or 1}"


def stored() -> list[str]:
    """Names of the args in a checkpoint, without its position."""
    return sorted(read_args(SMALLEST.split(), world_size=1, device="cpu").flat())


def contract() -> str:
    """The content of flags.json, one line per flag."""
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in flags().items()]
    return '{"flags": {\n' + ",\n".join(lines) + '\n},\n"stored": ' + json.dumps(stored(), indent=1) + "}\n"


def test_flags_and_stored_args_are_those_written_down():
    now, then = json.loads(contract()), json.loads(FROZEN.read_text(encoding="utf-8"))
    changed = {
        name: (then["flags"].get(name), now["flags"].get(name))
        for name in then["flags"] | now["flags"]
        if then["flags"].get(name) != now["flags"].get(name)
    }
    assert changed == {}, f"if this is wanted: python {Path(__file__).relative_to(REPOSITORY)}"
    assert set(now["stored"]) ^ set(then["stored"]) == set()


if __name__ == "__main__":
    FROZEN.write_text(contract(), encoding="utf-8")

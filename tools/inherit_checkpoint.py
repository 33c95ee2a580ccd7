"""A smaller model that starts from a larger one's weights; see --help and docs/inheritance.md."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.inherit import options as flags


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = flags.parser()
    options = parser.parse_args(argv)
    if problems := flags.problems(options):
        parser.error("\n  ".join(["", *problems]))

    # Imported after the flags are known to be right: these take seconds.
    from megatron_ext import platform

    platform.activate(options.device)
    import torch

    from megatron_ext.inherit import report
    from megatron_ext.inherit.run import inherit
    from megatron_ext.training import distributed

    summary = inherit(options)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if torch.distributed.is_initialized():
        distributed.finalize()
    if first:
        print(json.dumps(summary) if options.json else "\n".join(report.lines(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

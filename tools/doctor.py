#!/usr/bin/env python3
"""Say what this machine has and lacks, what will therefore be used, and how to get what is missing.

    python tools/doctor.py
    python tools/doctor.py --speed      # also measure matmuls, the link between two processes, the disk

Nothing is changed. The speeds are those that tools/plan_run.py asks for.

Exit code 0: a run can start here; 1: something is in its way; 2: bad usage.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.common import command
from megatron_ext.planning import machine, speed

MARKS = {"ok": "  ", "absent": "- ", "warning": "? ", "problem": "! "}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command.parser(__doc__)
    p.add_argument("--speed", action="store_true", help="measure speeds too (seconds)")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return p


@command.tool
def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = parser().parse_args(argv)
    # Megatron-Core warns of each package that it does not find: what this screen says better.
    warnings.simplefilter("ignore")
    found = list(machine.findings())
    speeds = measured() if options.speed else {}
    if options.json:
        print(json.dumps({"findings": [vars(finding) for finding in found], "speeds": speeds}))
    else:
        print("\n".join([*lines(found), *speed_lines(speeds)]))
    return 1 if any(finding.state == "problem" for finding in found) else 0


def lines(found: list[machine.Finding]) -> list[str]:
    """One screen: a line for each finding, then a command for each thing missing."""
    screen = ["  what               found, and what follows", ""]
    for finding in found:
        screen.append(f"{MARKS[finding.state]}{finding.name:<19}{finding.found}")
        screen.append(f"{'':<21}-> {finding.use}")
    missing = [finding for finding in found if finding.command]
    screen += ["", "to get what is missing:"] * bool(missing)
    return screen + [f"  {finding.name}: {finding.command}" for finding in missing]


def measured() -> dict[str, float]:
    """TFLOP/s of matmuls, GB/s one way between two processes, MB/s written to this disk."""
    import torch

    from megatron_ext import platform
    from megatron_ext.training.metrics import measured_flops

    dtype = torch.bfloat16 if platform.on_gpu() else torch.float32
    return {
        "matmul_tflops": measured_flops(dtype) / 1e12,
        "link_gbytes": speed.link_bytes_per_second() / 1e9,
        "disk_mbytes": speed.disk_bytes_per_second() / 1e6,
    }


def speed_lines(speeds: dict[str, float]) -> list[str]:
    """The speeds, and the flags that take them."""
    if not speeds:
        return []
    flags = f"--matmul-tflops {speeds['matmul_tflops']:.3g} --link-gbytes {speeds['link_gbytes']:.3g}"
    return [
        "",
        f"matmuls {speeds['matmul_tflops']:.3g} TFLOP/s a process, link {speeds['link_gbytes']:.3g} GB/s, "
        f"disk {speeds['disk_mbytes']:.0f} MB/s",
        f"for tools/plan_run.py: {flags}",
    ]


if __name__ == "__main__":
    sys.exit(main())

"""Runs of the real program inside the worker pool."""

import json
import tempfile
from pathlib import Path

from tests.helpers.pool import Pool


def _pretrain(argv: list[str]) -> None:
    import pretrain_pangu_pro

    pretrain_pangu_pro.main(argv)


def pretrain(pool: Pool, processes: int, argv: list, timeout: float = 240.0) -> list[dict]:
    """Run ``pretrain_pangu_pro.py`` on several processes; returns the records of its metrics file."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        pool.run(processes, _pretrain, [*map(str, argv), "--metrics-file", str(metrics)], timeout=timeout)
        return [json.loads(line) for line in metrics.read_text().splitlines()]


def losses(records: list[dict]) -> list[float]:
    """The training losses, in order."""
    return [record["lm_loss"] for record in records if "split" not in record]


def validation(records: list[dict]) -> dict:
    """The last validation record."""
    return [record for record in records if record.get("split") == "validation"][-1]


def flags(**values) -> list[str]:
    """Command line flags from keywords; True is a switch, False and None are left out."""
    argv: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv += [str(item) for item in (value if isinstance(value, list) else [value])]
    return argv

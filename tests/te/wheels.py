"""Transformer Engine's Python, version by version: fetched from the package index, unpacked, not installed.

python -m tests.te.wheels        # tests/run.sh does this; costs nothing once they are there
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: Those that Megatron-Core 0.16.1 accepts (its metadata: >=2.9.0a0,<2.12).
VERSIONS = ("2.9.0", "2.10.0", "2.11.0")
CACHE = Path(__file__).resolve().parents[2] / "build" / "transformer-engine"
SECONDS = 60


def folder(version: str) -> Path:
    """Where a version lies once it was fetched."""
    return CACHE / version


def fetch(version: str) -> None:
    """Download the wheel (0.7 MB; pure Python, its libraries are another package) and unpack it.

    Raises subprocess.SubprocessError if the index does not answer in time or does not hold it.
    """
    if folder(version).is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as aside:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
        wheel_only = ["--only-binary", ":all:", "--retries", "1", "--dest", aside]
        subprocess.run([*pip, *wheel_only, f"transformer-engine=={version}"], check=True, timeout=SECONDS)
        (wheel,) = Path(aside).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(Path(aside, "unpacked"))
        Path(aside, "unpacked").rename(folder(version))


if __name__ == "__main__":
    try:
        for each in VERSIONS:
            fetch(each)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"Transformer Engine's wheel cannot be had, tests/te is skipped: {error}", file=sys.stderr)

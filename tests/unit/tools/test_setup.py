"""The set-up script ends with a torch, whatever the package index holds: the builds it asks for, in order.

A stand-in for .venv/bin/python plays the package index; what pip does with gigabytes is rehearsed by hand
(CONTRIBUTING.md).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
#: Notes its arguments, fails for the builds of torch that the index "does not have".
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$ASKED"
if [[ "$*" == *torch==* ]] && ! [[ "$*" =~ $INDEX_HOLDS ]]; then
  echo "ERROR: ResolutionImpossible" >&2
  exit 1
fi
"""


@pytest.fixture
def set_up(tmp_path):
    """Runs the script in a folder of its own: (exit code, what it says, the torches it asked for)."""
    for name in ("tools/setup.sh", "constraints.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "megatron_ext" / "csrc").mkdir(parents=True)
    (tmp_path / "megatron_ext" / "csrc" / "kernels.cpp").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(index_holds: str, torch: str = "cpu") -> tuple[int, str, list[str]]:
        asked = tmp_path / "asked"
        environment = {
            "PATH": os.environ["PATH"],
            "ASKED": str(asked),
            "INDEX_HOLDS": index_holds,
            "TORCH": torch,
        }
        end = subprocess.run(
            ["bash", "tools/setup.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return (
            end.returncode,
            end.stderr,
            [line for line in asked.read_text().splitlines() if "torch==" in line],
        )

    return run


def version() -> str:
    return next(
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "torch==" in line
    )


def test_the_cpu_build_of_the_configured_index(set_up):
    code, said, asked = set_up(index_holds=r"\+cpu")
    assert code == 0 and "not to be had" not in said
    assert len(asked) == 1 and asked[0].endswith(f"{version()}+cpu") and "index-url" not in asked[0]


def test_else_the_cpu_build_of_pytorchs_own_index(set_up):
    code, said, asked = set_up(index_holds="download.pytorch.org/whl/cpu")
    assert code == 0 and said.count("not to be had") == 1
    assert len(asked) == 2 and asked[1].endswith(f"{version()}+cpu")


def test_else_the_default_build_with_a_word_on_its_size(set_up):
    code, said, asked = set_up(index_holds=r"torch==[0-9.]+$")
    assert code == 0 and said.count("not to be had") == 2 and "GB" in said
    assert "ResolutionImpossible" not in said
    assert len(asked) == 3 and asked[2].endswith(version())


def test_no_torch_at_all_is_an_error_with_pips_reason(set_up):
    code, said, _ = set_up(index_holds="nothing")
    assert code == 1 and "ResolutionImpossible" in said and "PIP_INDEX_URL" in said


def test_the_default_build_where_it_is_asked_for(set_up):
    code, _, asked = set_up(index_holds="torch==", torch="default")
    assert code == 0 and len(asked) == 1 and "+cpu" not in asked[0]


def test_another_word_for_the_build_is_refused(set_up):
    code, said, _ = set_up(index_holds="torch==", torch="gpu")
    assert code == 1 and "cpu or default" in said

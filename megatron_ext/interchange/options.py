"""What a conversion is asked to do."""

import argparse
import re
from dataclasses import MISSING, dataclass
from typing import Literal

from megatron_ext.common.files import is_same_place
from megatron_ext.common.flags import flag, wrong_fields

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def size_in_bytes(text: str) -> int:
    """500MB -> 500,000,000."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    return int(found[1]) * UNITS[found[2]]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """A conversion; each field is a flag of tools/convert_checkpoint.py."""

    source: Literal["hf", "megatron"] = flag(MISSING, "--from")
    """What --load is."""

    target: Literal["hf", "megatron"] = flag(MISSING, "--to")
    """What --save shall be."""

    load: str = flag(metavar="DIR")
    """The model: a folder with config.json, or a checkpoint folder."""

    save: str = flag(metavar="DIR")
    """Where to: a new or empty folder."""

    ckpt_step: int | None = flag(None, minimum=1)
    """Iteration of the checkpoint in --load; without it, the newest."""

    tokenizer_model: str | None = flag(None, metavar="PATH")
    """The model's tokenizer, if it moved or is not there."""

    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Number format of the tensors to write; source leaves them as they are."""

    hf_architecture: str | None = flag(None, metavar="TYPE")
    """model_type to export as, such as llama, qwen3 or pangu_pi; without it, the plainest."""

    max_shard_size: int | None = flag(None, type=size_in_bytes, metavar="SIZE", minimum=1)
    """Largest file of weights, such as 500MB; without it, 2GB."""

    allow_pickle: bool = False
    """Read pytorch_model.bin where there are no safetensors, as plain tensors (weights_only)."""

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        only = {
            "--allow-pickle": (self.allow_pickle, self.source == "hf", "--from hf"),
            "--ckpt-step": (self.ckpt_step is not None, self.source == "megatron", "--from megatron"),
            "--hf-architecture": (self.hf_architecture is not None, self.target == "hf", "--to hf"),
            "--max-shard-size": (self.max_shard_size is not None, self.target == "hf", "--to hf"),
        }
        found = list(wrong_fields(self))
        found += [
            f"{name} needs {needs}" for name, (given, fits, needs) in only.items() if given and not fits
        ]
        if is_same_place(self.load, self.save):
            found.append("--load and --save are the same folder")
        return found

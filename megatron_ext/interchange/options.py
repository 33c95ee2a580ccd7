"""What a conversion is asked to do."""

from dataclasses import dataclass

from megatron_ext.common.files import is_same_place


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """A conversion.

    Attributes:
        source, target: "hf" or "megatron": what ``load`` is, and what ``save`` shall be.
        ckpt_step: iteration of the checkpoint in ``load``; None is the newest.
        tokenizer_model: the model's tokenizer, if it moved or is not there.
        dtype: "fp32", "bf16", "fp16", or "source".
        hf_architecture: model_type to export as; None is the plainest.
        max_shard_size: bytes of the largest file of weights that an export writes.
        allow_pickle: read pytorch_model.bin where there are no safetensors.
    """

    source: str
    target: str
    load: str
    save: str
    ckpt_step: int | None = None
    tokenizer_model: str | None = None
    dtype: str = "source"
    hf_architecture: str | None = None
    max_shard_size: int | None = None
    allow_pickle: bool = False

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        only = {
            "--allow-pickle": (self.allow_pickle, self.source == "hf", "--from hf"),
            "--ckpt-step": (self.ckpt_step is not None, self.source == "megatron", "--from megatron"),
            "--hf-architecture": (self.hf_architecture is not None, self.target == "hf", "--to hf"),
            "--max-shard-size": (self.max_shard_size is not None, self.target == "hf", "--to hf"),
        }
        found = [f"{flag} needs {needs}" for flag, (given, fits, needs) in only.items() if given and not fits]
        if is_same_place(self.load, self.save):
            found.append("--load and --save are the same folder")
        return found

"""Opening a model of whatever kind a folder holds."""

from pathlib import Path

from megatron_ext.interchange.errors import InterchangeError
from megatron_ext.interchange.hf_source import HuggingFaceSource
from megatron_ext.interchange.megatron_source import MegatronSource, find_checkpoint
from megatron_ext.interchange.source import Source


def open_source(
    path: str | Path,
    allow_pickle: bool = False,
    *,
    iteration: int | None = None,
    tokenizer_model: str | Path | None = None,
) -> Source:
    """Open a Hugging Face folder, or a checkpoint of ours or Megatron-LM's, and check that it is whole.

    Args:
        path: the folder with ``config.json``; or the folder given to ``--save``, or one checkpoint in it.
        allow_pickle: read ``pytorch_model.bin`` too, by torch's weights-only unpickler.
        iteration: of a checkpoint; by default the one that the tracker names.
        tokenizer_model: the tokenizer's file or folder, where the source does not say, or it moved.

    Raises:
        InterchangeError: nothing usable is there; what is there is damaged, of an unknown architecture,
            a pickle that was not allowed; or the tokenizer is not the model's.
    """
    path = Path(path)
    if not path.is_dir():
        raise InterchangeError(f"--load {path}: there is no such folder")
    if (path / "config.json").is_file():
        return HuggingFaceSource(path, allow_pickle, tokenizer_model)
    if (folder := find_checkpoint(path, iteration)) is not None:
        return MegatronSource(folder, tokenizer_model)
    raise InterchangeError(
        f"--load {path}: neither a Hugging Face folder (no config.json) nor a torch_dist checkpoint "
        "(no iter_*, release or .metadata)"
    )

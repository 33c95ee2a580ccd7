"""Any model that can be opened, as a checkpoint that loads at any layout."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.interchange.open import open_source
from megatron_ext.interchange.source import Source
from megatron_ext.interchange.target import write_checkpoint
from megatron_ext.platform.collective import on_first_rank


def is_hugging_face(load: str) -> bool:
    """Whether a folder is a Hugging Face model's."""
    return (Path(load) / "config.json").is_file()


@contextmanager
def as_checkpoint(
    load: str, tokenizer_model: str | None = None, check: Callable[[Source], None] | None = None
) -> Iterator[str]:
    """The folder itself, or a Hugging Face folder written as a checkpoint; a collective call.

    It is written into the system's folder for temporary files (TMPDIR; with several machines it must be one
    that all of them see) and removed at the end. ``check`` may refuse what was opened.

    Raises:
        RunError: on every rank, if the Hugging Face folder cannot be opened.
    """
    if not is_hugging_face(load):
        yield load
        return

    def write(folder: Path) -> None:
        source = open_source(load, tokenizer_model=tokenizer_model)
        if check is not None:
            check(source)
        write_checkpoint(folder, source.model, source.dtype, source.get, tokenizer=source.tokenizer)

    with _temporary_folder() as folder:
        on_first_rank(lambda: write(folder))
        yield str(folder)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that all ranks know and the first one removes; a collective call."""
    made: list[tempfile.TemporaryDirectory[str]] = []

    def make() -> Path:
        made.append(tempfile.TemporaryDirectory(prefix="checkpoint_"))
        return Path(made[0].name)

    folder = on_first_rank(make)
    try:
        yield folder
    finally:
        for temporary in made:
            temporary.cleanup()

"""Errors of files that cannot be written."""

import errno
import os

import pytest

from megatron_ext.common.files import write_aside


def test_an_error_names_the_file_that_was_meant(tmp_path):
    """Not the temporary file, which the user does not know, and not an error without a name."""

    def full(file) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "folder").mkdir()
    cases = {"on-a-full-disk": full, "folder": lambda file: file.write(b"x"), "no/place": full}
    for name, write in cases.items():
        with pytest.raises(OSError) as error:
            write_aside(tmp_path / name, write)
        assert error.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_aside(tmp_path / "out", lambda file: file.write((tmp_path / "nothing").read_bytes()))
    assert error.value.filename == str(tmp_path / "nothing")

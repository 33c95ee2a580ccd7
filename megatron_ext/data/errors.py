"""The error of all that reads datasets; the command line knows it without loading NumPy."""


class DatasetError(ValueError):
    """A dataset cannot be used; the message names the file and what to do."""

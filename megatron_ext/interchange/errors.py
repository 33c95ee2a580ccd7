"""One error for everything that keeps a model from being exchanged."""


class InterchangeError(ValueError):
    """A folder cannot be read or written as a model; the message names it and says what to do."""

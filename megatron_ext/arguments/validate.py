"""The rules."""


def problems(args, typed):
    """Every rule's problems."""
    return []

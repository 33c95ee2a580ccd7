"""PanGu-pi for transformers: the two files that an exported folder carries along.

They stand alone beside ``config.json`` and are loaded with ``trust_remote_code=True``.
"""

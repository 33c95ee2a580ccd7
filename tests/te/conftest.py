"""TEST_ENGINE=2.11.0 makes this process one with that Transformer Engine; else the cases are left alone."""

import os

from tests.te import engine, wheels

VERSION = os.environ.get("TEST_ENGINE")
collect_ignore_glob = ["test_versions.py"] if VERSION else ["cases/*"]
if VERSION:
    engine.install(wheels.folder(VERSION))

"""Shared by all packages: files, locks, progress, errors. Independent of Megatron-Core."""

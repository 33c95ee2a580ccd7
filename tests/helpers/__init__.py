"""Shared by the tests: the worker pool and the set-up of Megatron-Core's global state."""

"""Tests: unit (mirrors megatron_ext), distributed (gloo workers), functional (golden traces), gpu."""

"""What every part needs: files, progress, agreement between ranks. Knows nothing of Megatron-Core."""

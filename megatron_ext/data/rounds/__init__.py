"""Multiple-round training: recorded losses, sampling of the next round, its dataset."""

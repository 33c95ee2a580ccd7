"""Training in rounds: losses of samples, the draw of the next round, its dataset."""

"""Whether a run fits a machine and how long it takes; what a machine has and lacks."""

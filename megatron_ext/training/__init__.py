"""The training program: set-up, steps, validation, reporting, stopping, checkpoints."""

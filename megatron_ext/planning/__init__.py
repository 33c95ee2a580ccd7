"""Estimates whether a run fits a machine and how long it takes; checks what a machine provides."""

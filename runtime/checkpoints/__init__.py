"""Checkpoints: weights and the state of a run, from and to files."""

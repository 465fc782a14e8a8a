"""Evaluation: forward-only tasks on the ranks of a run."""

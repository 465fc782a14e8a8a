"""Measured: what a profile has measured in; the curves that costs are read from, and how wrong they are, out."""

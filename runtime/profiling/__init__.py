"""Profiling: times of layers, messages and loaders, measured by ranks as a run has them."""

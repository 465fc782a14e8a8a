"""Costing: slices in; what they take of time, memory and links out."""

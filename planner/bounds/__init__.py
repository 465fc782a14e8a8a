"""Bounds: a Problem in; seconds that no schedule of it can beat, with a proof, out."""

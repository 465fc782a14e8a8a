"""Tensor parallelism: parameters in pieces, and layers that compute with some of them."""

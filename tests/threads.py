"""Threads that torch computes with, of which tests must not leave another number to those after them."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def computing_with(num_threads: int) -> Iterator[None]:
    """In between, torch computes with so many: kernels that add up what each thread has summed round by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

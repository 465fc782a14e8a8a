"""Same: two tensors in; whether they hold the same numbers, out. NaN is the same as NaN, and as nothing else."""

import torch
from torch import Tensor


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type and shape hold the same numbers, to the bit; in whatever layout."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.strided not in (a.layout, b.layout) or a.layout is not b.layout:
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())

"""Copies: modules in, copies of their own out; and modules as they stood before code ran in them.

Some layers hold a tensor that they computed (the weight of weight norm and spectral norm, an activation kept for
later), which torch does not copy.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn

CopiedT = TypeVar("CopiedT")


def copied(value: CopiedT, modules: Iterable[nn.Module]) -> CopiedT:
    """A deep copy of something that holds `modules`; tensors that they computed are copied as they are."""
    memo: dict[int, object] = {}
    for module in (part for root in modules for part in root.modules()):
        for held in vars(module).values():
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    return copy.deepcopy(value, memo)


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """While open, code may put other tensors in place of a module's buffers; they are as before afterwards."""
    before = [(part._buffers, dict(part._buffers)) for part in module.modules() if part._buffers]
    try:
        yield
    finally:
        for held, buffers in before:
            held.update(buffers)


@contextlib.contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, code may set attributes of modules and put in other buffers; they are as before afterwards."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            held = vars(module)
            held.clear()
            held.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

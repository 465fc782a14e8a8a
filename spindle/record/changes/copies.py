"""Copies: modules in, copies of their own out; and modules as they stood before code ran in them.

Some layers hold a tensor that they computed (the weight of weight norm and spectral norm, an activation kept for
later), which torch does not copy.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from spindle.record.changes.fingerprints import OF_MODULES

CopiedT = TypeVar("CopiedT")

HOOKS = frozenset(name for name in OF_MODULES if "hooks" in name)


def copied(value: CopiedT, modules: Iterable[nn.Module]) -> CopiedT:
    """A deep copy of something that holds `modules`; tensors that they computed are copied as they are."""
    memo: dict[int, object] = {}
    for module in (part for root in modules for part in root.modules()):
        for held in vars(module).values():
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    return copy.deepcopy(value, memo)


@contextlib.contextmanager
def attributes_kept(
    modules: Iterable[nn.Module], but: Callable[[nn.Module, str], bool] | None = None
) -> Iterator[None]:
    """While open, code may set attributes of modules, put in other buffers and register hooks; they are as before
    afterwards, `but` for attributes of which this is true. So is what lists and the like among them hold.
    """
    before = Attributes(modules)
    try:
        yield
    finally:
        before.put_back(but)


class Attributes:
    """Attributes, buffers and hooks of modules as they stand, and what lists and the like among them hold.

    Models of transformers register hooks in their first call, and note so in an attribute: both go back, or the next
    call would register them once more.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
        self.contents = [
            (value, copy.copy(value))
            for _, attributes, _ in self.before
            for name, value in attributes.items()
            if name in HOOKS or (name not in OF_MODULES and type(value) in (list, dict, set, deque))
        ]

    def put_back(self, but: Callable[[nn.Module, str], bool] | None = None) -> None:
        """Let all be as it was, `but` for attributes of which this is true."""
        for value, contents in self.contents:
            value.clear()
            value.extend(contents) if isinstance(value, list | deque) else value.update(contents)
        for module, attributes, buffers in self.before:
            held = vars(module)
            stays = {name: value for name, value in held.items() if but is not None and but(module, name)}
            held.clear()
            held.update(attributes | stays)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextlib.contextmanager
def values_kept(buffers: Iterable[Tensor]) -> Iterator[None]:
    """While open, code may change buffers in place; they hold what they held before afterwards."""
    before = [(buffer, buffer._version, buffer.detach().clone()) for buffer in buffers if not buffer.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)

"""Fingerprints: what values hold, to see whether they have changed: numbers and tensors in whatever objects."""

import inspect
import random
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEPTH = 6  # of objects in objects that are looked into
MOST = 5_000  # leaves of one value that are looked at

OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that torch keeps in each module."""

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator, count)
_SEQUENCES = (list, tuple, deque)


def fingerprint(value: object, depth: int = DEPTH) -> object:
    """What is equal of two values that hold the same numbers; functions are all alike."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), repr(value.detach().cpu().reshape(-1).tolist())
    if isinstance(value, _GENERATORS):
        return _drawn(value)
    if isinstance(value, np.ndarray | np.generic):
        return repr(value.tolist())
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return repr(value)
    if not depth or isinstance(value, torch.optim.Optimizer | type) or inspect.isroutine(value):
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return [(fingerprint(k, depth - 1), fingerprint(v, depth - 1)) for k, v in value.items()]
    if isinstance(value, set | frozenset):
        return sorted((fingerprint(each, depth - 1) for each in value), key=repr)
    if isinstance(value, _SEQUENCES):
        return [fingerprint(each, depth - 1) for each in value]
    if hasattr(value, "__dict__"):
        return type(value).__qualname__, fingerprint(vars(value), depth - 1)
    shown = repr(value)
    return type(value).__qualname__ if " at 0x" in shown else shown


def _drawn(generator: Any) -> str:
    """The state of a generator of random numbers, or what a counter gives next."""
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, count):
        return repr(generator)
    state = generator.getstate() if isinstance(generator, random.Random) else generator.get_state()
    return repr(state.tolist() if isinstance(state, Tensor) else state)


class Leaves:
    """Numbers, tensors and generators that values hold, by how code calls them.

    Of a list only entries that it had when it was first seen: what is appended to one that nobody reads is no state.
    """

    def __init__(self, *, copies: bool = True) -> None:
        """`copies`: of tensors, in place of themselves."""
        self.copies = copies
        self.lengths: dict[str, int] = {}  # of lists, when they were first seen
        self.known = False  # whether all have been seen

    def of(self, named: Mapping[str, object]) -> tuple[dict[str, Any], set[str]]:
        """Copies of the leaves, and lists that are not as long as they were."""
        self.grown: set[str] = set()
        self.seen: set[int] = set()
        self.kept: list[object] = []  # so that no id is used twice
        found: dict[str, Any] = {}
        for name, value in named.items():
            for leaf, held in self._below(name, value, DEPTH):
                found[leaf] = held
                if len(found) > MOST:
                    break
        self.known = True
        return found, self.grown

    def _below(self, name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Tensor):
            yield name, value.detach().clone() if self.copies else value
        elif type(value) in (int, float):
            yield name, value
        elif isinstance(value, _GENERATORS):
            yield name, _drawn(value)
        elif isinstance(value, Mapping):
            yield from self._inside(value, {f"{name}[{key!r}]": inner for key, inner in value.items()}, depth)
        elif isinstance(value, _SEQUENCES):
            length = self.lengths.setdefault(name, 0 if self.known else len(value))
            if len(value) != length:
                self.grown.add(name)
            named = {f"{name}[{index}]": inner for index, inner in enumerate(value) if index < length}
            yield from self._inside(value, named, depth)
        elif _is_plain_object(value):
            yield from self._inside(value, {f"{name}.{key}": inner for key, inner in vars(value).items()}, depth)

    def _inside(self, value: object, named: Mapping[str, object], depth: int) -> Iterator[tuple[str, Any]]:
        if depth and id(value) not in self.seen:
            self.seen.add(id(value))
            self.kept.append(value)
            for name, inner in named.items():
                yield from self._below(name, inner, depth - 1)


def _is_plain_object(value: object) -> bool:
    """Whether an object holds attributes of its own, and is none of torch's."""
    if isinstance(value, nn.Module | torch.optim.Optimizer | type) or inspect.isroutine(value):
        return False
    if type(value).__module__.partition(".")[0] in ("torch", "builtins", "functools", "threading"):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)

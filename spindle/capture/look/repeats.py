"""Repeats: one batch recorded several times; whether its task computes the same each time.

A planned run calls a task function in several processes, each as often as it needs, and goes through one recording for
many batches. So what a task computes may follow from its batch alone: not from a clock, nor from what earlier calls of
it have counted or kept.
"""

import functools
import inspect
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from spindle.inputs.same import same_numbers
from spindle.inputs.usercode import is_own_file, names_used
from spindle.record.recording import Aux, Node, Ref, tree
from spindle.record.run import Recorded

FAR = 1_000_003  # calls: beyond what counters of steps are compared with
MOST = 20_000  # values that are looked at
MOST_ENTRIES = 100  # of a list

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


def other_line(one: Recorded, other: Recorded) -> str | None:
    """Where two recordings of one batch differ, as "line 12 of model.py"; None where they are the same."""
    a, b = one.recording, other.recording
    for first, second in zip(a.nodes, b.nodes, strict=False):
        if first.site != second.site or _computation(first) != _computation(second):
            return first.line or second.line or "code of torch"
    if len(a.nodes) != len(b.nodes):
        longer = max(a.nodes, b.nodes, key=len)
        return longer[min(len(a.nodes), len(b.nodes))].line or "code of torch"
    for number, (left, right) in enumerate(zip(a.aux, b.aux, strict=False)):
        if not same_numbers(left, right):
            reader = next((node for node in a.nodes if number in node.aux()), None)
            return (reader.line if reader is not None else "") or "code of torch"
    return None


def _computation(node: Node) -> str:
    """What a call computes, without the numbers in what it reads of the batch."""

    def described(leaf: Any) -> Any:
        known = isinstance(leaf, Ref | Aux | bool | int | float | complex | str | None)
        return repr(leaf) if known else type(leaf).__qualname__

    name = getattr(node.function, "__name__", type(node.function).__name__)
    return repr((name, node.block, node.grad, node.autocast, tree(described, node.args), tree(described, node.kwargs)))


# -- what a task keeps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where code of a task may keep a number, or a list, from call to call; `name` is how the code calls it."""

    name: str
    holder: Any
    key: Any

    def get(self) -> Any:
        """What stands there; of a list a copy."""
        if self.draws:
            return _state(self.holder)
        if self.key is None:
            return list(self.holder)
        if isinstance(self.holder, MutableMapping):
            return self.holder.get(self.key)
        if isinstance(self.holder, list):
            return self.holder[self.key] if self.key < len(self.holder) else None
        return getattr(self.holder, self.key, None)

    @contextmanager
    def far(self) -> Iterator[None]:
        """While open, the number is far from what it was; a list is as long as after many calls."""
        value = self.get()
        self.put(value * (1 + FAR // max(1, 100 * len(value))) if self.key is None else value + FAR)
        try:
            yield
        finally:
            self.put(value)

    def owner(self, modules: Iterable[nn.Module]) -> tuple[type, str] | None:
        """The class of the module that holds it, itself or in a list or dict, and the attribute; None for others."""
        for module in modules:
            if module is self.holder:
                return type(module), str(self.key)
            for name, value in vars(module).items():
                if value is self.holder:
                    return type(module), name
        return None

    @property
    def is_own(self) -> bool:
        """Whether it stands there itself, and not as an attribute of the holder's class."""
        return isinstance(self.holder, list | MutableMapping) or self.key in getattr(self.holder, "__dict__", {})

    @property
    def draws(self) -> bool:
        """Whether it is a generator of random numbers."""
        return isinstance(self.holder, _GENERATORS)

    def is_changed(self, before: Any) -> bool:
        """Whether something else stands there than before."""
        now = self.get()
        if self.draws:
            return bool(now != before)
        if self.key is None:
            return list(map(id, now)) != list(map(id, before))
        return isinstance(now, int | float) and isinstance(before, int | float) and now != before

    def put(self, value: Any) -> None:
        """Let something else stand there."""
        if self.draws:
            return
        if self.key is None:
            self.holder[:] = value
        elif isinstance(self.holder, MutableMapping):
            self.holder[self.key] = value
        elif isinstance(self.holder, list):
            if self.key < len(self.holder):
                self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


def _state(generator: Any) -> str:
    if isinstance(generator, random.Random):
        return repr(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return repr(generator.get_state())


def places(function: Callable[..., Any], modules: list[nn.Module]) -> list[Place]:
    """Numbers and lists that a task function, what it calls, and `modules` can keep: variables of enclosing functions,
    globals, attributes.
    """
    return Search().run(function, modules)


class Search:
    """What a task function, and what it calls, can keep. `slots`: variables of enclosing functions and globals;
    `holders`: lists, dicts, sets and (with a dot behind the name) attributes of objects, by how code calls them.
    """

    def __init__(self) -> None:
        self.found: list[Place] = []
        self.slots: list[Place] = []
        self.holders: list[tuple[str, Any]] = []
        self.seen: set[int] = set()
        self.numbers: set[tuple[int, Any]] = set()
        self.kept: list[Any] = []

    def run(self, function: Callable[..., Any], modules: Iterable[nn.Module]) -> list[Place]:
        """Numbers, lists and generators, those of modules too."""
        self._function(function)
        for module in modules:
            self._function(type(module).forward)
            self._attributes(type(module).__name__, module)
        return self.found

    def _new(self, value: Any) -> bool:
        if id(value) in self.seen or len(self.seen) > MOST:
            return False
        self.seen.add(id(value))
        self.kept.append(value)
        return True

    def _value(self, name: str, holder: Any, key: Any, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if (id(holder), key) not in self.numbers:  # several functions may read one variable
                self.numbers.add((id(holder), key))
                self.found.append(Place(name, holder, key))
        elif isinstance(value, (*_GENERATORS, list)):
            if self._new(value):
                self.found.append(Place(name, value, None))
                if isinstance(value, list):
                    self.holders.append((name, value))
                    for index, inner in enumerate(value[:MOST_ENTRIES]):
                        self._value(f"{name}[{index}]", value, index, inner)
        elif isinstance(value, set | deque | np.ndarray) or (isinstance(value, Tensor) and _is_plain(value)):
            if self._new(value):
                self.holders.append((name, value))
        elif isinstance(value, dict):
            if self._new(value):
                self.holders.append((name, value))
                for own, inner in list(value.items()):
                    self._value(f"{name}[{own!r}]", value, own, inner)
        elif inspect.isroutine(value) or hasattr(value, "__wrapped__"):
            self._function(value)
        elif isinstance(value, nn.Module) or _is_users(value):
            self._attributes(name, value)

    def _attributes(self, name: str, value: Any) -> None:
        if not self._new(value):
            return
        if not isinstance(value, nn.Module | type):
            self._function(type(value).__call__) if callable(value) else None
            self.holders.append((f"{name}.", vars(value)))
            for own, inner in _numbers_of_class(value):
                self._value(f"{name}.{own}", value, own, inner)
        for own, inner in list(getattr(value, "__dict__", {}).items()):
            if not own.startswith("__") and not (isinstance(value, nn.Module) and own.startswith("_")):
                self._value(f"{name}.{own}", value, own, inner)

    def _function(self, function: Any) -> None:
        function = inspect.unwrap(function)
        if isinstance(function, functools.partial):
            for index, value in enumerate(function.args):
                if not isinstance(value, int | float):  # which stay as they are
                    self._value(f"argument {index}", None, index, value)
            for name, value in function.keywords.items():
                self._value(name, function.keywords, name, value)
            function = function.func
        owner = getattr(function, "__self__", None)
        if isinstance(owner, _GENERATORS):
            self._value(type(owner).__name__, None, None, owner)
        elif owner is not None and _is_users(owner):
            self._attributes(type(owner).__name__, owner)
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is None or not self._new(function) or not is_own_file(code.co_filename):
            return
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not set yet
                continue
            self.slots.append(Place(name, cell, "cell_contents"))
            self._value(name, cell, "cell_contents", value)
        for name in names_used(code):
            if name in function.__globals__:
                self.slots.append(Place(name, function.__globals__, name))
                self._value(name, function.__globals__, name, function.__globals__[name])


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is a small one with numbers, and no parameter."""
    return not (isinstance(value, nn.Parameter) or value.is_meta) and value.numel() <= MOST


def _numbers_of_class(value: Any) -> Iterator[tuple[str, Any]]:
    """Numbers that an object has of its class, until code sets its own."""
    for kind in type(value).__mro__:
        for name, inner in vars(kind).items() if _is_users(kind) else ():
            if type(inner) in (int, float) and not name.startswith("__") and name not in vars(value):
                yield name, inner


def _is_users(value: Any) -> bool:
    """Whether an object, or a class, is of the user's own files."""
    kind = value if isinstance(value, type) else type(value)
    if not isinstance(getattr(value, "__dict__", None), dict | MappingProxyType):
        return False
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    return kind.__module__ == "__main__" or (file is not None and is_own_file(file))

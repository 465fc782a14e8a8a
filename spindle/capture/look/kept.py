"""Kept: what a task function keeps outside of modules from call to call: as it was, what a call set, and numbers that
show whether code asks anything of them.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spindle.capture.look.repeats import Place, Search
from spindle.inputs.same import same_numbers

MOST_MARKED = 2_000  # numbers
MOST_ANSWERS = 100  # of one number that are turned round: code that counts up to it must come to an end


class State:
    """Variables of enclosing functions, globals, and what lists, dicts, sets and objects of the user's hold, as they
    are when it is made. `places`: numbers, lists and generators among them, those of modules too.
    """

    def __init__(self, function: Callable[..., Any], modules: Iterable[nn.Module]) -> None:
        """Of a task's function, and of what it and `modules` call; attributes of `modules` themselves are left out."""
        search, own = Search(), set(map(id, modules := list(modules)))
        self.places = search.run(function, modules)
        numbers = [place for place in self.places if not place.draws and place.key is not None]
        self.numbers = [place for place in numbers if id(place.holder) not in own]
        self.slots = [(place, place.get()) for place in search.slots]
        self.holders = [(name, holder, _copied(holder)) for name, holder in search.holders]

    def changed(self) -> dict[int, str]:
        """What holds something else now, by id, and how code calls it."""
        found = {
            id(holder): _name(name, holder, before)
            for name, holder, before in self.holders
            if not _is_same(holder, before)
        }
        return found | {_id(place): place.name for place, value in self.slots if place.get() is not value}

    @property
    def reached(self) -> set[int]:
        """All that the function can reach, by id."""
        found = {id(holder) for _, holder, _ in self.holders} | {_id(place) for place, _ in self.slots}
        return found | {_id(place) for place in self.numbers}

    def among(self, ids: Collection[int]) -> list[Place]:
        """The numbers among what has these ids."""
        return [place for place in self.numbers if _id(place) in ids]

    def put_back(self) -> None:
        """Let all be as it was."""
        for place, value in self.slots:
            if place.get() is not value:
                place.put(value)
        for _, holder, before in self.holders:
            if not _is_same(holder, before):
                _fill(holder, before)

    @contextmanager
    def marked(self) -> Iterator[dict[int, str]]:
        """While open, numbers are objects of their own, so that what sets one shows even where it sets an equal one.
        Gives an empty dict that holds afterwards what was set, as `changed` does.
        """
        own = [place for place in self.numbers[:MOST_MARKED] if place.is_own]
        marks = [(place, place.get()) for place in own if type(place.get()) in (int, float)]
        made = [(place, value, (_Int if type(value) is int else _Float)(value)) for place, value in marks]
        for place, _, mark in made:
            place.put(mark)
        found: dict[int, str] = {}
        try:
            yield found
        finally:
            for place, value, mark in made:
                if place.get() is mark:
                    place.put(value)
                else:
                    found[_id(place)] = place.name


def _name(name: str, holder: Any, before: Any) -> str:
    """How code calls what has changed, by the first such entry of a dict or attribute of an object."""
    if not isinstance(holder, dict):
        return name
    key = next((key for key in (*holder, *before) if holder.get(key) is not before.get(key)), "")
    return f"{name}{key}" if name.endswith(".") else f"{name}[{key!r}]"


def _id(place: Place) -> int:
    """One number for a variable, whichever search finds it."""
    return hash((id(place.holder), place.key))


def _copied(holder: Any) -> Any:
    if isinstance(holder, Tensor):
        return holder._version, holder.detach().clone()
    if isinstance(holder, np.ndarray | deque):
        return holder.copy()
    return dict(holder) if isinstance(holder, dict) else type(holder)(holder)


def _is_same(holder: Any, before: Any) -> bool:
    if isinstance(holder, Tensor):
        version, value = before
        return bool(holder._version == version or same_numbers(holder, value))
    if isinstance(holder, np.ndarray):
        return bool(holder.shape == before.shape) and holder.tobytes() == before.tobytes()
    if len(holder) != len(before):
        return False
    if isinstance(holder, dict):
        return all(key in holder and holder[key] is value for key, value in before.items())
    if isinstance(holder, set):
        return bool(holder == before)
    return all(a is b for a, b in zip(holder, before, strict=True))


def _fill(holder: Any, before: Any) -> None:
    if isinstance(holder, Tensor):
        with torch.no_grad():
            holder.copy_(before[1])
        return
    if isinstance(holder, np.ndarray):
        holder[...] = before
        return
    holder.clear()
    if isinstance(holder, list | deque):
        holder.extend(before)
    else:
        holder.update(before)


class _Int(int):
    """A number that is another object than an equal one."""


class _Float(float):
    """A number that is another object than an equal one."""


# -- numbers that answer the opposite ---------------------------------------------------------------------------------


@dataclass
class _Answers:
    left: int = MOST_ANSWERS


@dataclass(frozen=True)
class _Turned:
    """Makes numbers of which, and of what is computed from which, every comparison is false where it were true."""

    answers: _Answers = field(default_factory=_Answers)

    def of(self, value: Any) -> Any:
        """Such a number; other values as they are."""
        if type(value) not in (int, float):
            return value
        made = (_TurnedInt if type(value) is int else _TurnedFloat)(value)
        made.maker = self
        return made

    def answer(self, found: Any) -> Any:
        """The opposite of a truth value, as long as it is not asked for too often."""
        if found is NotImplemented or not self.answers.left:
            return found
        self.answers.left -= 1
        return not found


def _turned(kind: type) -> dict[str, Any]:
    def computing(name: str) -> Callable[..., Any]:
        own = getattr(kind, name)

        def compute(self: Any, *args: Any) -> Any:
            found = own(self, *args)
            if isinstance(found, tuple):
                return tuple(map(self.maker.of, found))
            return self.maker.of(found)

        return compute

    def comparing(name: str) -> Callable[..., Any]:
        own = getattr(kind, name)
        return lambda self, *args: self.maker.answer(own(self, *args))

    operations = "add sub mul floordiv truediv mod pow divmod"
    names = [f"__{r}{each}__" for each in operations.split() for r in ("", "r")] + ["__neg__", "__abs__", "__round__"]
    methods = {name: computing(name) for name in names}
    methods |= {f"__{name}__": comparing(f"__{name}__") for name in ("eq", "ne", "lt", "le", "gt", "ge", "bool")}
    return methods | {"__hash__": kind.__hash__}


_TurnedInt: Any = type("_TurnedInt", (int,), _turned(int))
_TurnedFloat: Any = type("_TurnedFloat", (float,), _turned(float))


@contextmanager
def turned(place: Place, value: Any) -> Iterator[None]:
    """While open, a number that a task keeps is `value`, and code that compares it gets the opposite answer."""
    before = place.get()
    place.put(_Turned().of(value))
    try:
        yield
    finally:
        place.put(before)

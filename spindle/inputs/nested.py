"""Nested: a batch with fields inside of fields in; the same with one level of fields, named "inputs.pixels", out; and
back.

What a tokenizer or the collation of a DataLoader gives may be dicts in dicts, named tuples too. Their innermost fields
are cut by samples like others.
"""

from collections import OrderedDict, UserDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from spindle.errors import WorkloadError


class InnerName(str):
    """The name of a field inside of another: "inputs.pixels". `keys` lead to it from the outside in, `kinds` are the
    types of what holds them, from the second key on.
    """

    keys: tuple[str, ...]
    kinds: tuple[type, ...]

    def __new__(cls, keys: tuple[str, ...], kinds: tuple[type, ...]) -> "InnerName":
        """`kinds` has one entry less than `keys`."""
        made = super().__new__(cls, ".".join(keys))
        made.keys, made.kinds = keys, kinds
        return made

    def __reduce__(self) -> Any:
        """As its parts."""
        return InnerName, (self.keys, self.kinds)


def flat(where: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The innermost fields of a batch by name. Raises WorkloadError where two have the same name."""
    found: dict[str, Any] = {}
    for name, value in batch.items():
        inner = None if isinstance(name, InnerName) else _inner((name,), (), value)
        for each, leaf in [(name, value)] if inner is None else inner.items():
            if each in found:
                raise WorkloadError(f"{where}: two fields of its batch are called {str(each)!r}; rename one of them")
            found[each] = leaf
    return found


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the user's code knows it, from its innermost fields."""
    found: dict[str, Any] = {}
    inside: dict[str, list[tuple[InnerName, Any]]] = {}
    for name, value in fields.items():
        if isinstance(name, InnerName):
            found.setdefault(name.keys[0], None)  # in its place
            inside.setdefault(name.keys[0], []).append((name, value))
        else:
            found[name] = value
    for first, parts in inside.items():
        found[first] = _built(parts, 1)
    return found


def _built(parts: Iterable[tuple[InnerName, Any]], depth: int) -> Any:
    grouped: dict[str, list[tuple[InnerName, Any]]] = {}
    for name, value in parts:
        grouped.setdefault(name.keys[depth], []).append((name, value))
    values: dict[str, Any] = {}
    kind: type = dict
    for key, members in grouped.items():
        name, value = members[0]
        kind = name.kinds[depth - 1]
        values[key] = value if len(name.keys) == depth + 1 else _built(members, depth + 1)
    return _made(kind, values)


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind(**values) if issubclass(kind, tuple) else kind(values)


def _inner(keys: tuple[str, ...], kinds: tuple[type, ...], value: Any) -> dict[InnerName, Any] | None:
    """The innermost fields of a value by name; None where it is no field of fields, or has nothing that is cut."""
    fields = _fields(value)
    if fields is None:
        return None
    found: dict[InnerName, Any] = {}
    holds = False
    for key, each in fields.items():
        own, of = (*keys, key), (*kinds, type(value))
        inner = _inner(own, of, each)
        found.update({InnerName(own, of): each} if inner is None else inner)
        holds |= inner is not None or isinstance(each, Tensor | np.ndarray | list | tuple)
    return found if holds else None


def _fields(value: Any) -> dict[str, Any] | None:
    """Fields of a dict, or of a named tuple, that can be made anew from them; None for all else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if type(value) not in (dict, OrderedDict) and not isinstance(value, UserDict):
        return None
    if not value or not all(isinstance(key, str) for key in value):
        return None
    if isinstance(value, UserDict):
        try:
            again = type(value)(dict(value))
        except Exception:  # it is made of something else
            return None
        if any(again[key] is not each for key, each in value.items()):
            return None
    return dict(value)

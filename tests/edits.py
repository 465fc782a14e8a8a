"""Edits: changes to a value, or to the bytes of its file, that are themselves data, so that they can be kept, shortened
and tried on a newer sample. An edit whose place is not there changes nothing.

    ["set", path, value]        ["drop", path]              ["copy", from, path]       ["name", path, key]
    ["times", path, factor]     ["whole", path, factor]     ["double", path, place]
    ["long", path, characters]  ["many", path, items]       ["nest", path, depth]
    of bytes: ["cut", start, end]  ["put", at, text]  ["flip", at, bits]  ["repeat", start, end]
"""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Edit = list[Any]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**400, -(10**9), 0.0, -0.0, 0.5,
    -0.5, 1e-320, 1e-18, 1e-9, 1e9, 1e18, 1e308, -1e308, float("nan"), float("inf"), "", "a", "1", "01", "-1", "nan",
    "\x1b[31mred\x1b[0m", "\x9b2J", "\u202eleft", "\x00", "a\nb", "\ud800", "\u00e9\u200d", "'", "../..", "/dev/zero",
    "1e999", "-", "--", ":", "=", ",", "0-99999999", "99999999999x99999999999",
    [], {}, [[]], {"a": 1}, [1, 2],
]  # fmt: skip
FACTORS = (-1, 0.5, 2, 10, 1000, 1e-6, 1e6, 1e12)
KEYS = ("x", "\x1b[2J", "2", "0", "format", "__class__")
TEXTS = ("\x1b[31m", "\xff\xfe", "{", "[" * 200, "9" * 5000, "&a *a", "- ", "\0", ",", '"', "\r\n", "NaN", "!!python/")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all parts of a value, without its own."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def at(value: Any, path: Sequence[Any]) -> Any:
    """The part of a value at a path; raises KeyError, IndexError or TypeError where there is none."""
    for key in path:
        value = value[key]
    return value


def random_edit(value: Any, draw: random.Random) -> Edit:
    """One change to the structure of a value."""
    every = list(places(value))
    if not every:
        return ["set", [], draw.choice(VALUES)]
    path = list(draw.choice(every))
    kind = draw.choice(("set",) * 6 + ("drop", "drop", "copy", "copy", "times", "times", "whole", "double", "name",
                                       "long", "many", "nest"))  # fmt: skip
    match kind:
        case "set":
            return ["set", path, draw.choice(VALUES)]
        case "copy":
            return ["copy", list(draw.choice(every)), path]
        case "times" | "whole":
            numbers = [p for p in every if type(at(value, p)) in (int, float)]
            return [kind, list(draw.choice(numbers or every)), draw.choice(FACTORS)]
        case "double":
            return ["double", path, draw.randrange(4)]
        case "name":
            return ["name", path, draw.choice(KEYS)]
        case "long" | "many":
            return [kind, path, draw.choice((40, 300, 5000, 20_000))]
        case "nest":
            return ["nest", path, draw.choice((3, 60, 200))]
        case _:
            return ["drop", path]


def random_bytes_edit(size: int, draw: random.Random) -> Edit:
    """One change to that many bytes."""
    start, end = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
    if draw.random() < 0.5:
        end = min(end, start + draw.randrange(1, 9))
    kind = draw.choice(("cut", "cut", "put", "put", "flip", "repeat"))
    if kind == "put":
        return ["put", start, draw.choice(TEXTS)]
    if kind == "flip":
        return ["flip", start, draw.randrange(1, 256)]
    return [kind, start, size if kind == "cut" and draw.random() < 0.3 else end]


def edited(value: Any, edits: Iterable[Edit]) -> Any:
    """A copy of the value with the edits of its structure, one after the other."""
    root = [copy.deepcopy(value)]
    for kind, path, *more in edits:
        if kind in ("cut", "put", "flip", "repeat"):
            continue
        try:
            _change(root, kind, [0, *path], *more)
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError):
            continue
    return root[0]


def _change(root: list[Any], kind: str, path: list[Any], what: Any = None) -> None:
    holder, key = at(root, path[:-1]), path[-1]
    old = holder[key]
    match kind:
        case "set":
            holder[key] = copy.deepcopy(what)
        case "drop":
            del holder[key]
        case "copy":
            at(root, [0, *what[:-1]])[what[-1]] = copy.deepcopy(old)
        case "times":
            holder[key] = old * what if type(old) in (int, float) else old
        case "whole":
            holder[key] = int(old * what) if type(old) in (int, float) else old
        case "double":
            if isinstance(holder, list):
                holder.insert(what, copy.deepcopy(old))
            else:
                holder[f"{key}{what}"] = copy.deepcopy(old)
        case "name":
            holder[what] = holder.pop(key)
        case "long":
            holder[key] = ((old if isinstance(old, str) and old else "x") * what)[:what]
        case "many":
            holder[key] = [copy.deepcopy(old) for _ in range(min(what, 100_000 // (1 + len(repr(old)))))]
        case "nest":
            for _ in range(what):
                old = [old]
            holder[key] = old


def edited_bytes(data: bytes, edits: Iterable[Edit]) -> bytes:
    """The bytes with the edits of bytes, one after the other."""
    for kind, start, *more in edits:
        if kind == "cut":
            data = data[:start] + data[more[0] :]
        elif kind == "put":
            data = data[:start] + more[0].encode("latin-1") + data[start:]
        elif kind == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ more[0]]) + data[start + 1 :]
        elif kind == "repeat":
            data = data[: more[0]] + data[start : more[0]] + data[more[0] :]
    return data

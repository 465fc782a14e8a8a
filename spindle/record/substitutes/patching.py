"""Patching: other things stand in place of some attributes while anybody wants it, in whatever thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

Change = tuple[object, str, Any]
"""An object, the name of an attribute, and what stands there for a while."""


class Shared:
    """A context of the whole process: entered with the first who opens it, left with the last."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        """`make` gives the context, anew each time that it is entered."""
        self.make, self.lock, self.open = make, threading.Lock(), 0
        self.inner: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def __enter__(self) -> None:
        with self.lock:
            if self.open == 0:
                self.inner = self.make()
                self.inner.__enter__()
            self.open += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                self.inner.__exit__(None, None, None)


@contextlib.contextmanager
def in_place(changes: list[Change]) -> Iterator[None]:
    """While open, these stand in their places."""
    before: list[Change] = []
    try:
        for owner, name, ours in changes:
            before.append((owner, name, vars(owner)[name]))
            setattr(owner, name, ours)
        yield
    finally:
        while before:
            setattr(*before.pop())

"""Checkpoints: activation checkpointing in the user's own code (`torch.utils.checkpoint`), as planned runs need it.

- What is computed again in backward stands where it stood the first time: it draws the same random numbers, and
  computes the same part of the features.
- A reentrant checkpoint becomes one that is not: same gradients, and autograd sees which parameters get some.
- While a task is recorded a checkpoint is a plain call, however it was imported.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint as torch_checkpoint

from spindle.record.substitutes.draws import Stream, current, drawing_from
from spindle.record.substitutes.patching import Change, Shared, in_place
from spindle.record.substitutes.randomness import Drawing

Resume = Callable[[], contextlib.AbstractContextManager[object]]
"""Opens once more what was open around a checkpoint."""


class Way(Protocol):
    """What becomes of checkpoints in code that runs just now."""

    def reentrant(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a checkpoint with use_reentrant=True."""

    def steps(self, own: Callable[..., Any], function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
        """What goes on before and after the function of a checkpoint without; `own` gives torch's."""


_WAY: ContextVar[Way | None] = ContextVar("spindle_checkpoints", default=None)
_AROUND: ContextVar[tuple[Resume, ...]] = ContextVar("spindle_around_checkpoints", default=())


@contextlib.contextmanager
def going(way: Way) -> Iterator[None]:
    """While open, checkpoints go this way."""
    token = _WAY.set(way)
    try:
        with _PATCHED:
            yield
    finally:
        _WAY.reset(token)


@contextlib.contextmanager
def resumed(context: Resume) -> Iterator[None]:
    """While open, what checkpoints compute again is computed inside of `context()` too."""
    token = _AROUND.set((*_AROUND.get(), context))
    try:
        yield
    finally:
        _AROUND.reset(token)


class Planned:
    """Checkpoints of code that runs, which is computed again as it was."""

    def reentrant(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """See Way."""
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    def steps(self, own: Callable[..., Any], function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[None]:
        """See Way."""
        drawings = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Drawing)]  # type: ignore[no-untyped-call]
        place = (drawings[-1], len(drawings[-1].shapes)) if drawings else None
        found: Iterator[None] = own(_Again(function, _AROUND.get(), current(), place), *args, **kwargs)
        return found


@dataclass(frozen=True, slots=True)
class _Again:
    """The function of a checkpoint, computed again. `place`: what draws there, and the number of its next draw."""

    function: Callable[..., Any]
    around: tuple[Resume, ...]
    stream: Stream
    place: tuple[Drawing, int] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context())
                stack.enter_context(resumed(context))
            stack.enter_context(drawing_from(self.stream))
            if self.place is not None:
                stack.enter_context(self.place[0].again_from(self.place[1]))
            stack.enter_context(going(Planned()))
            return self.function(*args, **kwargs)


class _Reentrant:
    """Stands in place of torch's autograd function of reentrant checkpoints, where `checkpoint` finds it."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a checkpoint."""
        way = _WAY.get()
        return self.own.apply(function, preserve, *args) if way is None else way.reentrant(function, args)


def _changes() -> list[Change]:
    """Our own versions of what `checkpoint` calls: they hold for each name under which users have imported it."""
    own = torch_checkpoint._checkpoint_without_reentrant_generator

    def steps(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
        way = _WAY.get()
        if way is None:
            untouched: Iterator[None] = own(function, *args, **kwargs)
            return untouched
        return way.steps(own, function, args, kwargs)

    return [
        (torch_checkpoint, "CheckpointFunction", _Reentrant(torch_checkpoint.CheckpointFunction)),
        (torch_checkpoint, "_checkpoint_without_reentrant_generator", steps),
    ]


_PATCHED = Shared(lambda: in_place(_changes()))

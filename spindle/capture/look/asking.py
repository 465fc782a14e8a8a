"""Asking: a layer that runs on a batch and on parts of it in; what it asks of all samples together out.

A layer may compute from tensors of the batch alone, such as a mask or lengths. What keeps the rows of samples is
harmless, but whether any text is long, or how long the longest is, can be another answer for a part. Where the answers
differ, results show whether that matters. Where they are alike by chance, the layer runs once more with another answer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spindle.record.lazy import ATTRIBUTES
from spindle.record.recording import leaves_of, tensors_in, tree
from spindle.record.sites import innermost_line

Question = tuple[str, str]
"""The line of a call, and the name of its function."""


@dataclass
class _Calls:
    """All calls of one question: the shapes that they were given, and what they gave."""

    given: list[tuple[torch.Size, ...]] = field(default_factory=list)
    gave: list[Any] = field(default_factory=list)


class Asking(TorchFunctionMode):
    """While open, it notes what calls compute from `batch` alone. Calls of `changed` give what `change` makes of it."""

    def __init__(
        self,
        batch: Iterable[Tensor],
        changed: Question | None = None,
        change: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        super().__init__()
        self.calls: dict[Question, _Calls] = defaultdict(_Calls)
        self._own = {id(tensor): tensor for tensor in batch}  # kept, so that no id is used twice
        self._changed, self._change = changed, change

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call it, and note what it gives where no value of the model is among its arguments."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        if func in ATTRIBUTES or not all(id(tensor) in self._own for tensor in given):
            return result
        question = innermost_line(), getattr(func, "__name__", "code")
        if question == self._changed:
            result = tree(self._change, result)
        self._own.update((id(tensor), tensor) for tensor in tensors_in(result))
        if given:
            self.calls[question].given.append(tuple(tensor.shape for tensor in given))
            self.calls[question].gave.append(result)
        return result


def alike_by_chance(whole: Asking, parts: Sequence[Asking]) -> Iterator[Question]:
    """Questions that have the same answer for the whole and all parts, though they are asked of other samples."""
    for question, calls in whole.calls.items():
        others = [part.calls.get(question) for part in parts]
        if all(other is not None and len(other.gave) == len(calls.gave) for other in others):
            pairs = [pair for other in others if other for pair in zip(calls.gave, other.gave, strict=True)]
            asked = any(other is not None and other.given != calls.given for other in others)
            if asked and all(_is_same(a, b) for a, b in pairs):
                yield question


def _is_same(a: Any, b: Any) -> bool:
    ours, others = (leaves_of(value, object) for value in (a, b))
    return len(ours) == len(others) and all(map(_is_equal, ours, others))


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and isinstance(a, bool | int | float) and a == b


def _more(value: Any) -> Any:
    return _moved(value, 1)


def _less(value: Any) -> Any:
    return _moved(value, -1)


def _moved(value: Any, by: int) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + by
    if not isinstance(value, Tensor):
        return value
    return ~value if value.dtype == torch.bool else value + by


def _longer(value: Any) -> Any:
    """What `unique` or an index by a mask may give: a row more."""
    return torch.cat([value, value[-1:]]) if isinstance(value, Tensor) and value.ndim and len(value) else value


CHANGES: Sequence[Callable[[Any], Any]] = (_more, _less, _longer)
"""What makes another answer of one, to see whether a layer's results depend on it."""

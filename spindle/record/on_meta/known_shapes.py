"""Known shapes: what operations give on the meta device, by the shapes of their arguments, so that each is found once.

torch finds most of them in Python, which takes longer than many operations do, and a capture records a task some
twenty times, mostly on the same few numbers of samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class _Like:
    """What tells a tensor on the meta device."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        """A tensor like that."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


class KnownShapes:
    """Runs operations of ATen. One that neither writes nor gives views, all on the meta device, gives tensors of the
    same shapes, strides and types each time that its arguments are alike: it runs once for each kind of arguments.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Like | tuple[_Like, ...]] = {}
        self._is_plain: dict[Callable[..., Any], bool] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the operation gives."""
        plain = self._is_plain.get(func)
        if plain is None:
            plain = self._is_plain[func] = _is_plain(func)
        parts: list[object] = [func, *kwargs]
        if not (plain and _noted((*args, *kwargs.values()), parts)):
            return func(*args, **kwargs)
        key = tuple(parts)
        known = self._known.get(key)
        if known is not None:
            return known.made() if isinstance(known, _Like) else tuple(each.made() for each in known)
        result = func(*args, **kwargs)
        if (found := _like(result)) is not None:
            self._known[key] = found
        return result


def _is_plain(func: Any) -> bool:
    schema = func._schema
    aliases = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return func.namespace == "aten" and not aliases


def _noted(values: Sequence[Any], parts: list[object]) -> int | None:
    """Adds to `parts` what tells the values apart; how many tensors are among them. None where one of them is no plain
    tensor on the meta device and no constant.
    """
    count = 0
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            if not value.is_meta or value.layout is not torch.strided or value.dtype.is_complex:
                return None
            parts += (value.shape, value.stride(), value.dtype)
            count += 1
        elif kind in (list, tuple, torch.Size):
            parts += (kind, len(value))
            inner = _noted(value, parts)
            if inner is None:
                return None
            count += inner
        elif kind in _CONSTANTS:
            parts += (kind, value)
        else:
            return None
    return count


def _like(result: Any) -> _Like | tuple[_Like, ...] | None:
    if type(result) is Tensor and result.is_meta and result.layout is torch.strided:
        return _Like(tuple(result.shape), result.stride(), result.dtype)
    if type(result) is not tuple:
        return None
    found = tuple(each for each in map(_like, result) if isinstance(each, _Like))
    return found if len(found) == len(result) else None

"""Slots: nested arguments with their tensors taken out, and put back.

Nested means what `torch.utils._pytree` knows (tuples, lists, dicts, outputs of transformers) and dataclasses.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Mark:
    """What stands for a tensor in a nested structure; it is a leaf, whatever else it is."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Slot(Mark):
    """Where tensor number `index` stands among the arguments or results of a block."""

    index: int


_LEAVES = (Slot, type(None), bool, int, float, str)


def with_slots(structure: Any) -> tuple[Any, list[Tensor]]:
    """A nested structure with Slots in place of its tensors, and the tensors."""
    tensors: list[Tensor] = []

    def slot(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    return mapped(slot, structure), tensors


def filled(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """A structure of `with_slots` with tensors put back."""
    return mapped(lambda leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf, structure)


def mapped(function: Callable[[Any], Any], structure: Any) -> Any:
    """A nested structure with `function` applied to each leaf.

    Plain containers, which every call of a block goes through twice, are followed here: torch's way takes ten times as
    long.
    """
    kind = type(structure)
    if kind in _LEAVES or isinstance(structure, Tensor | Mark):
        return function(structure)
    if kind is tuple or kind is list:
        return kind([mapped(function, value) for value in structure])
    if kind is dict:
        return {key: mapped(function, value) for key, value in structure.items()}

    def leaf(value: Any) -> Any:
        if isinstance(value, Mark) or not dataclasses.is_dataclass(value) or isinstance(value, type):
            return function(value)
        twin = copy.copy(value)  # not by its __init__, which may compute
        for part in dataclasses.fields(value):
            if hasattr(value, part.name):
                object.__setattr__(twin, part.name, mapped(function, getattr(value, part.name)))
        return twin

    return pytree.tree_map(leaf, structure)

"""Slots: nested arguments with their tensors taken out, and put back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Slot:
    """Where tensor number `index` stands among the arguments or results of a block."""

    index: int


def with_slots(structure: Any) -> tuple[Any, list[Tensor]]:
    """A nested structure with Slots in place of its tensors, and the tensors."""
    tensors: list[Tensor] = []

    def slot(tensor: Tensor) -> Slot:
        tensors.append(tensor)
        return Slot(len(tensors) - 1)

    return pytree.tree_map_only(Tensor, slot, structure), tensors


def filled(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """A structure of `with_slots` with tensors put back."""
    return pytree.tree_map_only(Slot, lambda slot: tensors[slot.index], structure)

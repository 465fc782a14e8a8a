"""Recording: the calls that one run of a task function made on values that depend on parameters, and their execution.

A value is a number: parameters and buffers that change come first (`leaves`), then what calls give. A call that writes
to a tensor gives a new value for it, so that every value has one maker.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from spindle.record.slots import Mark, mapped

LeafT = TypeVar("LeafT")
_PLAIN = (int, float, str, bool, type(None), torch.dtype)


@dataclass(frozen=True, slots=True)
class Ref(Mark):
    """Value number `index` among the arguments of a call."""

    index: int


@dataclass(frozen=True, slots=True)
class Aux(Mark):
    """Tensor number `index` that was computed for real, from the batch alone."""

    index: int


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast that a call was made under, where that is not the workload's own."""

    enabled: bool
    dtype: torch.dtype


def takes_gradient(value: Tensor) -> bool:
    """Whether a gradient can come back to a tensor. A view made without gradients says so where its base does, and yet
    gives none.
    """
    base = value._base
    return value.requires_grad and not (value.grad_fn is None and base is not None and base.requires_grad)


class Assigned:
    """A buffer in whose place a new tensor is put. Who holds the buffer does so; by itself it writes the value."""

    __name__ = "assign"

    def __call__(self, buffer: Tensor, value: Tensor) -> Tensor:
        """The buffer."""
        with torch.no_grad():
            return buffer.copy_(value)


@dataclass(slots=True)
class Node:
    """One recorded call: `function(*args, **kwargs)` gives values `outs`, in the order of its tensors; -1 stands for a
    tensor that it was given.

    `site` is where the call was made; `block` names the call of a repeated layer, such as "vision.layers.3@1";
    `component` is the call of a component that it was made in. `grad`: whether gradients were on. `writes`: leaves that
    it changes in place; `unnoticed`: autograd does not see that. `draws`: it draws random numbers.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[int]
    site: int
    component: str = ""
    grad: bool = True
    block: str = ""
    autocast: Autocast | None = None
    writes: tuple[str, ...] = ()
    draws: bool = False
    line: str = ""
    unnoticed: bool = False

    def refs(self) -> list[int]:
        """Values that it reads."""
        return [ref.index for ref in leaves_of((self.args, self.kwargs), Ref)]

    def aux(self) -> list[int]:
        """Tensors computed from the batch that it reads."""
        return [aux.index for aux in leaves_of((self.args, self.kwargs), Aux)]


@dataclass(frozen=True, kw_only=True)
class LeafWrite:
    """Calls that write to parameter `target`, and the calls that compute what is written, from `sources`, constants,
    and `clocks`, which some of them change: buffers that the task changes by constants alone.

    `after`: all that uses the target in the task comes before it, or, when False, after it; None: nothing uses it.
    `repeatable`: to write twice is to write once. `text` is equal for writes that do the same. `shapes`: of the
    sources, with their types. `unnoticed`: autograd does not see it, so that backward computes with what was written.
    """

    target: str
    sources: tuple[str, ...]
    nodes: tuple[Node, ...]
    leaves: Mapping[int, str]
    aux: Mapping[int, Tensor]
    after: bool | None
    repeatable: bool
    line: str
    text: str
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    clocks: tuple[str, ...] = ()
    unnoticed: bool = False


@dataclass(slots=True)
class Recording:
    """What one run of a task function on some samples came to.

    `leaves` are names of parameters and of buffers that change, by value number; `shapes`, `dtypes` and `needs_grad`
    are of all values; `aux` holds what was computed for real. `writes` are to parameters, and in no node.
    """

    leaves: dict[int, str]
    nodes: list[Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    needs_grad: list[bool] = field(default_factory=list)
    aux: list[Tensor] = field(default_factory=list)
    loss: int = -1
    writes: list[LeafWrite] = field(default_factory=list)

    def makers(self) -> dict[int, int]:
        """Number of the node that makes each value."""
        return {out: number for number, node in enumerate(self.nodes) for out in node.outs if out >= 0}

    def buffer_behind(self, value: int, buffers: Collection[str]) -> str:
        """The one of `buffers` that a value follows from; "" where it follows from anything else of the model too."""
        maker, stack = self.makers(), [value]
        found: set[str] = set()
        seen: set[int] = set()
        while stack:
            number = stack.pop()
            if number in self.leaves:
                found.add(self.leaves[number])
            elif number in maker and number not in seen:
                node = self.nodes[maker[number]]
                if node.block:
                    return ""
                stack += node.refs()
            seen.add(number)
        return min(found) if found and found <= set(buffers) else ""


def tree(function: Callable[[Any], Any], structure: Any) -> Any:
    """Nested arguments with `function` applied to each leaf: `mapped`, and slices."""
    kind = type(structure)
    if kind is slice:
        return slice(*(tree(function, v) for v in (structure.start, structure.stop, structure.step)))
    if kind is tuple or kind is list:
        return kind([tree(function, value) for value in structure])
    if kind is dict:
        return {key: tree(function, value) for key, value in structure.items()}
    if kind in _PLAIN or isinstance(structure, Tensor | Mark):
        return function(structure)
    return mapped(function, structure)


def leaves_of(structure: Any, kind: type[LeafT]) -> list[LeafT]:
    """Leaves of one kind in nested arguments, in order."""
    if isinstance(structure, kind):
        return [structure]
    found: list[LeafT] = []
    tree(lambda leaf: found.append(leaf) if isinstance(leaf, kind) else None, structure)
    return found


def tensors_in(structure: Any) -> list[Tensor]:
    """Tensors of nested results, in order."""
    return leaves_of(structure, Tensor)


Leaf = Callable[[str], Tensor]
"""The tensor of a parameter or buffer by its name."""

Put = Callable[[str, Tensor], None]
"""Puts a tensor in place of a buffer."""


def execute(
    nodes: Sequence[Node],
    values: dict[int, Tensor],
    *,
    aux: Callable[[int], Tensor],
    leaf: Leaf,
    leaves: Mapping[int, str],
    blocks: Mapping[str, Callable[..., Any]],
    device: torch.device,
    put: Put | None = None,
) -> None:
    """Run recorded calls in order; `values` holds what they read of others and takes what they give.

    `aux(i)` is tensor i that was computed from the batch, on the device; `blocks` runs calls of layers by name. `put`
    takes what is assigned to a buffer; None: it is written into the buffer.
    """

    def decoded(argument: Any) -> Any:
        kind = type(argument)
        if kind is Ref:
            known = values.get(argument.index)
            return leaf(leaves[argument.index]) if known is None else known
        return aux(argument.index) if kind is Aux else argument

    for node in nodes:
        if put is not None and type(node.function) is Assigned:
            put(node.writes[0], decoded(node.args[1]))
            continue
        function = blocks[node.block] if node.block else node.function
        with _as_recorded(node, device):
            result = function(*tree(decoded, node.args), **(tree(decoded, node.kwargs) if node.kwargs else {}))
        if len(node.outs) == 1 and type(result) is Tensor:
            values[node.outs[0]] = result
        elif node.outs:
            values.update(zip(node.outs, tensors_in(result), strict=True))
        values.pop(-1, None)


def _as_recorded(node: Node, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The modes that a call was made under."""
    if node.grad and node.autocast is None:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if not node.grad:
        stack.enter_context(torch.no_grad())
    if node.autocast is not None:
        stack.enter_context(torch.autocast(device.type, node.autocast.dtype, enabled=node.autocast.enabled))
    return stack

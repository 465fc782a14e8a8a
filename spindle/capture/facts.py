"""Facts: recordings of a whole batch and of a part of it in; constants in which they differ out.

Each rank calls the task function on its own samples. What that computes from the batch alone (a mask, the longest
length, a number of classes, whether any text is long) reaches the recorded calls as constants and real tensors. Most
say the same of a part as of the whole: they are equal, or the part has the rows of its samples. Others are facts of the
whole batch. Where they differ at capture, values are compared and show whether that matters. A fact that was alike in
all that capture saw is compared in each step.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spindle.record.changes.fingerprints import fingerprint
from spindle.record.recording import Aux, Node, Ref, tree
from spindle.values.units import Bounds, Units

Slot = tuple[object, str, int]
"""Place in the code or name of a block call, the call of a component, and which of the leaves of its arguments;
`_CALLS` stands for the number of calls, `_LEAVES` for that of leaves, `_ABSENT` for calls that a part does not make."""

_CALLS, _LEAVES, _ABSENT = -1, -2, -3
_COMPARED = (bool, int, complex, str, torch.dtype, type(None))
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_MASK = 1e30  # infinities, and the least numbers of a type, stand in masks
_LESS_EXACT = 2e-2  # of types with fewer bits


@dataclass(frozen=True, slots=True)
class Fact:
    """What a recorded call of a whole batch and the same call of a part of it take at one place of their arguments."""

    slot: Slot
    node: Node
    whole: Any
    part: Any

    def is_alike(self, whole: "Samples", part: "Samples") -> bool:
        """Whether the part takes what the whole takes, or the rows of its own samples."""
        if self.slot[2] == _ABSENT:
            return False
        if self.slot[2] < 0:  # some call, or leaf, of the whole must be like it
            return any(
                len(each) == len(self.part)
                and all(_is_alike(a, b, whole, part) for a, b in zip(each, self.part, strict=True))
                for each in self.whole
            )
        return _is_alike(self.whole, self.part, whole, part)

    def may_be_absent(self, per_sample: Mapping[Slot, float], others: int) -> bool:
        """Whether the part makes no such call, and the whole no more than `others`, samples that the part does not
        have, may make. `per_sample`: how many calls a sample makes at most.
        """
        return self.slot[2] == _ABSENT and len(self.whole) <= per_sample.get(self.slot, 0.0) * others

    @property
    def is_of_a_call(self) -> bool:
        """Whether it is about a call as such, which is made or not, and about nothing that it computes with."""
        return self.slot[2] == _ABSENT

    def text(self, whole: "Samples", part: "Samples") -> str:
        """What differs, in words: "'mul' (line 3 of model.py) computes with 1.0 for ... and with 2.0 for ..."."""
        name = self.node.block or getattr(self.node.function, "__name__", "code")
        line = f" ({self.node.line})" if self.node.line else ""
        samples = f"samples {part.bounds[0]} to {part.bounds[1] - 1} alone"
        if self.is_of_a_call:
            return f"{name!r}{line} is not called for {samples}, and is for the whole batch"
        if self.slot[2] < 0:
            return f"{name!r}{line} computes with other constants for {samples} than anywhere in the whole batch"
        own, other = part.value(self.part), whole.value(self.whole)
        if isinstance(own, Tensor) and isinstance(other, Tensor) and own.ndim > 0 and own.shape[1:] == other.shape[1:]:
            return f"{name!r}{line} computes with other numbers for {samples} than the whole batch has for them"
        return f"{name!r}{line} computes with {_text(own)} for {samples}, and with {_text(other)} for the whole batch"


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples of a batch, and the tensors that were computed from them.

    `known`: what comparisons of them with others came to, by id of both tensors: each layer is given the same mask.
    """

    aux: Sequence[Tensor]
    units: Units
    bounds: Bounds
    known: dict[tuple[int, int], bool] = field(default_factory=dict)

    def value(self, leaf: Any) -> Any:
        """What a leaf of arguments stands for."""
        return self.aux[leaf.index] if type(leaf) is Aux else leaf


def facts(whole: Sequence[Node], part: Sequence[Node]) -> Iterator[Fact]:
    """What recorded calls of a whole batch and of a part of it take besides values of the model, side by side, but for
    equal constants, which stay so while the recordings do.

    Where a place is called another number of times (once a sample, say), each call of the part stands beside all of the
    whole, as a `_CALLS`, or none does, as an `_ABSENT`; where a call takes another number of leaves, each leaf beside
    all, as a `_LEAVES`.
    """
    calls, own_calls = _by_place(whole), _by_place(part)
    for place in dict.fromkeys((*calls, *own_calls)):
        nodes, own = calls.get(place, []), own_calls.get(place, [])
        if len(nodes) == len(own):
            for node, other in zip(nodes, own, strict=True):
                yield from _of_call(place, node, other)
            continue
        if not own:
            yield Fact(absent(nodes[0]), nodes[0], nodes, None)
        all_leaves = [_constants(node) for node in nodes]
        for node in own:
            yield Fact((*place, _CALLS), node, all_leaves, _constants(node))


def by_sample(whole: Sequence[Node], parts: Sequence[Sequence[Node]], num_samples: int) -> dict[Slot, float]:
    """Of each place in the code, how many calls a batch of `num_samples` makes for each, where its parts together call
    it as often as the whole does, so that calls are of some samples each; 0 where they do not.
    """
    calls, of_parts = Counter(map(absent, whole)), Counter(absent(node) for part in parts for node in part)
    return {slot: count / num_samples if count == of_parts[slot] else 0.0 for slot, count in calls.items()}


def absent(node: Node) -> Slot:
    """What stands for the calls of a place that a part of a batch does not make."""
    return node.block.partition("@")[0] or node.site, node.component.partition("@")[0], _ABSENT


def _of_call(place: tuple[object, str], node: Node, other: Node) -> Iterator[Fact]:
    leaves, others = _leaves(node), _leaves(other)
    if len(leaves) != len(others):
        for own in _constants(other):
            yield Fact((*place, _LEAVES), node, [[leaf] for leaf in leaves if type(leaf) is not Ref], [own])
        return
    for index, (leaf, own) in enumerate(zip(leaves, others, strict=True)):
        values = type(leaf) is Ref and type(own) is Ref
        if not (values or (isinstance(leaf, (*_COMPARED, float)) and _is_same(leaf, own))):
            yield Fact((*place, index), node, leaf, own)


def _constants(node: Node) -> list[Any]:
    return [leaf for leaf in _leaves(node) if type(leaf) is not Ref]


def apart(whole: Sequence[Node], part: Sequence[Node], of_whole: Samples, of_part: Samples) -> Iterator[Slot]:
    """Where a part of a batch takes something else than the whole."""
    return (fact.slot for fact in facts(whole, part) if not fact.is_alike(of_whole, of_part))


def _is_alike(leaf: Any, own: Any, whole: Samples, part: Samples) -> bool:
    a, b = whole.value(leaf), part.value(own)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return _is_same(a, b)
    key = id(a), id(b)
    if key not in part.known:
        part.known[key] = _is_share(a, b, whole.units, whole.bounds, part.bounds)
    return part.known[key]


def _by_place(nodes: Sequence[Node]) -> Mapping[tuple[object, str], list[Node]]:
    found: dict[tuple[object, str], list[Node]] = defaultdict(list)
    for node in nodes:
        found[node.block or node.site, node.component].append(node)
    return found


def _leaves(node: Node) -> list[Any]:
    found: list[Any] = []
    tree(found.append, (node.args, node.kwargs))
    return found


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_ROUNDING[torch.float32]) or (math.isnan(a) and math.isnan(b))
    if a is b or type(a) is not type(b) or isinstance(a, _COMPARED):
        return type(a) is type(b) and bool(a == b)
    return fingerprint(_held(a)) == fingerprint(_held(b))


def _held(value: Any) -> Any:
    return (value.args, value.keywords) if isinstance(value, partial) else value


def _is_share(whole: Tensor, part: Tensor, units: Units, held: Bounds, bounds: Bounds) -> bool:
    if whole.dtype != part.dtype or whole.ndim != part.ndim:
        return False
    dims = [dim for dim in range(whole.ndim) if whole.shape[dim] != part.shape[dim]]
    if len(dims) != 1:
        return not dims and _is_close(whole, part)
    return any(_is_cut(whole, part, dims[0], span) for span in _spans(units, whole.shape[dims[0]], held, bounds))


def _spans(units: Units, size: int, held: Bounds, bounds: Bounds) -> Iterator[tuple[int, int]]:
    for unit in units.counts:
        try:
            yield units.span(unit, size, held, bounds)
        except ValueError:  # entries that are no rows of this unit
            continue


def _is_cut(whole: Tensor, part: Tensor, dim: int, span: tuple[int, int]) -> bool:
    start, length = span
    return length == part.shape[dim] and _is_close(whole.narrow(dim, start, length), part)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():  # both are rows of a field
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if torch.equal(a, b):
        return True
    rounding = _ROUNDING.get(a.dtype, _LESS_EXACT)
    sizes = a.abs().to(torch.float32)
    sizes = sizes[sizes < _MASK]
    scale = float(sizes.max()) if sizes.numel() else 0.0
    return torch.allclose(a, b, rtol=rounding, atol=rounding * scale, equal_nan=True)


def _text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.item()) if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"

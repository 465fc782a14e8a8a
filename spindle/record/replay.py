"""Replay: what one recording computed for real, as a list of calls that later batches of the same shapes go through.

A task function mostly does the same for every batch of the same shapes: then running its real calls anew gives all that
the recorded ones read, in a fraction of the time. What Python read of a tensor (`.tolist()`, `if`, an index) is a
guard: where it reads something else, or a result has another shape, the batch is recorded anew.

Not seen are reads that bypass torch, such as reads of numpy arrays that share a tensor's memory: then nothing is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spindle.record.functions import writes_first
from spindle.record.lazy import GIVES_MEMORY
from spindle.record.recording import leaves_of, tensors_in, tree
from spindle.record.slots import Mark

_BYPASSES: frozenset[Any] = GIVES_MEMORY | {torch.autograd.backward, torch.autograd.grad}


@dataclass(frozen=True, slots=True)
class Real(Mark):
    """Tensor number `index` among all tensors that are computed for real."""

    index: int


@dataclass(slots=True)
class _Call:
    """One real call: its results' numbers and shapes, and what Python read (with Real in place of tensors)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    read: Any
    reads: bool
    writes: bool


@dataclass
class RealCalls:
    """Real calls while a recording is under way. `sound`: nothing was seen that a replay would miss."""

    sound: bool = True
    calls: list[_Call] = field(default_factory=list)
    _tensors: list[Tensor] = field(default_factory=list)
    _number: dict[int, int] = field(default_factory=dict)
    _made: set[int] = field(default_factory=set)
    _measured: set[int] = field(default_factory=set)

    def number(self, value: Tensor) -> int:
        """The number of a real tensor."""
        found = self._number.get(id(value))
        if found is None:
            found = self._number[id(value)] = len(self._tensors)
            self._tensors.append(value)
        return found

    def note(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note a call that has run."""
        if not self.sound:
            return
        if function in _BYPASSES or any(map(_is_mapped, args)):
            self.sound = False
            return
        given, named = tree(self._encoded, args), tree(self._encoded, kwargs)
        made = tensors_in(result)
        outs = []
        for tensor in made:
            known = id(tensor) in self._number
            outs.append(self.number(tensor))
            if not known:
                self._made.add(outs[-1])
        read = None
        reads = not made and result is not None
        if reads:
            read = result
            if not _comparable(result):
                self.sound = False
        self.calls.append(
            _Call(
                function,
                given,
                named,
                tuple(outs),
                tuple(tuple(t.shape) for t in made),
                read,
                reads,
                writes_first(function, args, kwargs) or "out" in kwargs,
            )
        )

    def measured(self, values: Sequence[Any]) -> None:
        """Note that code has asked for sizes: a replay must find the same."""
        known = (self._number.get(id(value)) for value in values if isinstance(value, Tensor))
        self._measured.update(number for number in known if number in self._made)

    def _encoded(self, value: Any) -> Any:
        return Real(self.number(value)) if isinstance(value, Tensor) else value

    def replay(self, fields: Mapping[str, Any], aux: Sequence[Tensor]) -> "Replay | None":
        """What gives `aux` anew from other fields of the same shapes; None where that is not sure."""
        if not self.sound:
            return None
        numbers = {name: self.number(value) for name, value in fields.items() if isinstance(value, Tensor)}
        wanted = [self._number.get(id(value)) for value in aux]
        start = {n: t for n, t in enumerate(self._tensors) if n not in self._made and n not in numbers.values()}
        return Replay(self._needed(wanted), numbers, start, wanted, list(aux))

    def _needed(self, wanted: Sequence[int | None]) -> list[_Call]:
        """Calls that what is wanted, or a guard, depends on; writes in place are all kept."""
        needed = self._measured | {number for number in wanted if number is not None}
        kept: list[_Call] = []
        for call in reversed(self.calls):
            if call.reads or call.writes or needed & set(call.outs):
                kept.append(call)
                needed.update(real.index for real in leaves_of((call.args, call.kwargs), Real))
        return kept[::-1]


def _is_mapped(value: Any) -> bool:
    """Whether a tensor stands for many, inside of vmap and its like."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _comparable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_comparable, value))
    return isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device | torch.Size | None)


@dataclass(frozen=True)
class Replay:
    """Calls that compute anew what a recording computed for real."""

    calls: list[_Call]
    fields: Mapping[str, int]
    start: Mapping[int, Tensor]
    wanted: Sequence[int | None]
    constants: Sequence[Tensor]

    def run(self, fields: Mapping[str, Any]) -> list[Tensor] | None:
        """The tensors that recorded calls read, for these fields; None where the batch must be recorded anew."""
        values: dict[int, Tensor] = dict(self.start)
        values.update((number, fields[name]) for name, number in self.fields.items())

        def decoded(leaf: Any) -> Any:
            return values[leaf.index] if type(leaf) is Real else leaf

        with torch.no_grad():
            for call in self.calls:
                try:
                    result = call.function(*tree(decoded, call.args), **tree(decoded, call.kwargs))
                except Exception:  # recording it anew tells where in the user's code
                    return None
                if call.reads:
                    if result != call.read:
                        return None
                    continue
                made = [result] if type(result) is Tensor else tensors_in(result)
                for number, tensor, shape in zip(call.outs, made, call.shapes, strict=True):
                    if tensor.shape != shape:
                        return None
                    values[number] = tensor
        return [
            constant if number is None else values[number].detach()
            for number, constant in zip(self.wanted, self.constants, strict=True)
        ]


def signature(fields: Mapping[str, Any]) -> tuple[object, ...] | None:
    """What two batches must share for one to go through the other's replay; None for fields that do not compare."""
    found: list[object] = []
    for name, value in fields.items():
        if isinstance(value, Tensor):
            found.append((name, tuple(value.shape), value.dtype, value.stride()))
            continue
        text = _plain(value)
        if text is None:
            return None
        found.append((name, text))
    return tuple(found)


def _plain(value: Any) -> str | None:
    """Plain nested values as text; None for anything else."""
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    if isinstance(value, list | tuple):
        parts = [_plain(item) for item in value]
        return None if None in parts else f"{type(value).__name__}{parts}"
    if type(value) is dict:
        pairs = [(str(key), _plain(item)) for key, item in value.items()]
        return None if any(text is None for _, text in pairs) else repr(pairs)
    return None

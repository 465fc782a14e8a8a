"""Replay: what one recording computed for real, as a list of calls that later batches of the same shapes go through.

A task function mostly does the same for every batch of the same shapes: then running its real calls anew gives all that
the recorded ones read, in a fraction of the time. What Python read of a tensor (`.tolist()`, `if`, an index) is a
guard: where it reads something else, or a result has another shape, the batch is recorded anew.

Not seen are reads that bypass torch, such as reads of numpy arrays that share a tensor's memory: then nothing is kept.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spindle.record.functions import writes_first
from spindle.record.lazy import GIVES_MEMORY
from spindle.record.recording import leaves_of, tensors_in, tree
from spindle.record.slots import Mark

_NAMES = """
    add sub rsub mul div true_divide floor_divide remainder pow neg abs sign sqrt rsqrt exp log log1p sin cos
    tanh sigmoid clamp clamp_min clamp_max round floor ceil eq ne lt le gt ge logical_and logical_or
    logical_not logical_xor isnan isfinite where masked_fill to type float double half bfloat16 long int short
    bool clone detach contiguous __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__
    __floordiv__ __mod__ __pow__ __rpow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__
    __or__ __xor__ __invert__
"""
ELEMENTWISE: frozenset[Any] = frozenset(
    getattr(of, name) for of in (Tensor, torch) for name in _NAMES.split() if callable(getattr(of, name, None))
) - {int, float, bool}
"""Functions whose result has an entry for each entry of their arguments, where these have its shape."""

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
        by_entry = self._by_entry({number: name for name, number in numbers.items()})
        entries = {
            place: f"tensor {id(aux[place])}" if number is None else by_entry[number]
            for place, number in enumerate(wanted)
            if number is None or number in by_entry
        }
        calls = _needed(self.calls, self._measured | {number for number in wanted if number is not None})
        return Replay(calls, numbers, start, wanted, list(aux), entries, frozenset(self._measured))

    def _by_entry(self, fields: Mapping[int, str]) -> dict[int, str]:
        """How tensors are computed each of whose entries follows from the same entry of fields, so that samples do not
        come together in them: equal texts for equal computations.
        """
        if any(call.writes for call in self.calls):
            return {} if self.calls else dict(fields)
        found = dict(fields)
        for call in self.calls:
            read = list(dict.fromkeys(real.index for real in leaves_of((call.args, call.kwargs), Real)))
            of_batch = [number for number in read if number in found or number in self._made]
            one = len(call.outs) == 1 and call.function in ELEMENTWISE
            if one and all(n in found and tuple(self._tensors[n].shape) == call.shapes[0] for n in of_batch):
                given = [found.get(number, f"tensor {id(self._tensors[number])}") for number in read]
                plain = tree(lambda leaf: "" if isinstance(leaf, Real) else leaf, (call.args, call.kwargs))
                found[call.outs[0]] = hashlib.blake2b(f"{call.function}{plain}{given}".encode()).hexdigest()
        return found


def _needed(calls: Sequence[_Call], wanted: set[int]) -> list[_Call]:
    """Calls that what is wanted, or a guard, depends on; writes in place are all kept."""
    needed = set(wanted)
    kept: list[_Call] = []
    for call in reversed(calls):
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
    """Calls that compute anew what a recording computed for real.

    `by_entry`: tensors that recorded calls read which follow entry by entry from fields, or from nothing of the batch,
    and how; `measured`: tensors whose sizes code has asked for.
    """

    calls: list[_Call]
    fields: Mapping[str, int]
    start: Mapping[int, Tensor]
    wanted: Sequence[int | None]
    constants: Sequence[Tensor]
    by_entry: Mapping[int, str] = field(default_factory=dict)
    measured: frozenset[int] = frozenset()

    @cached_property
    def of_samples_together(self) -> "Replay":
        """The same without the tensors that follow entry by entry from fields, in whose place old ones come."""
        wanted = [None if place in self.by_entry else number for place, number in enumerate(self.wanted)]
        needed = set(self.measured) | {number for number in wanted if number is not None}
        return replace(self, calls=_needed(self.calls, needed), wanted=wanted)

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

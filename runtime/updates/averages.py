"""Averages: a running average of the weights that a rank answers for (`spindle.inputs.ema`).

- Each weight is averaged by one rank, the one that also saves it: of its range or piece where it is sharded or cut.
- It is averaged in float32 at least, and from the master of a parameter that has one: in bfloat16 an average with a
  decay of 0.999 would stand still.
- Before the first step that counts there is none, and the average is the weights.
- An evaluation on averages brings each to all ranks that hold the weight, and puts the weights back afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from spindle.inputs.ema import EMA
from spindle.runtime.comms.transport import Transport, Wait
from spindle.runtime.parallel.names import piece_of
from spindle.runtime.programs.program import Program
from spindle.values.graph import parse_piece

PREFIX = "ema:"
T = TypeVar("T")


class Averages:
    """Averages of some tensors by name; `count` steps have gone into them."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.count = ema, 0
        self.values: dict[str, Tensor] = {}

    def update(self, step: int, ask: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take in what the tensors are after a step; they are asked for where it counts."""
        if not self.ema.counts(step):
            return
        tensors = ask()
        if not self.count:
            self.values = {name: _wide(tensor).clone() for name, tensor in tensors.items()}
        else:
            groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
            for name, held in self.values.items():
                groups.setdefault((held.device, held.dtype), []).append(name)
            for names in groups.values():
                now = [_wide(tensors[name]) for name in names]
                torch._foreach_lerp_([self.values[name] for name in names], now, 1 - self.ema.decay)
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """The averages as `ema:NAME`."""
        return {PREFIX + name: value for name, value in self.values.items()}

    @staticmethod
    def among(saved: Mapping[str, T]) -> dict[str, T]:
        """What a checkpoint holds of averages, by the names of the weights."""
        return {name.removeprefix(PREFIX): value for name, value in saved.items() if name.startswith(PREFIX)}

    def load(self, count: int, saved: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Go on with the averages of a checkpoint, by whole names; of what it does not average, with what it is now."""
        self.count, self.values = count, {}
        for name, now in tensors.items() if count else ():
            whole = saved.get(PREFIX + parse_piece(name).whole)
            own = now if whole is None else piece_of(whole, name)
            self.values[name] = _wide(own).to(now.device, copy=True)


def averaged(
    ema: EMA, parameters: Iterable[str], buffers: Mapping[str, Tensor], held: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """What is averaged of a model: these parameters, as `held`, and buffers where they are to be."""
    found = {name: held(name) for name in parameters}
    if ema.buffers == "average":
        found |= {name: value for name, value in buffers.items() if value.is_floating_point()}
    return {name: value.detach() for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Shared:
    """An average, the rank that keeps it, and the other ranks that hold the weight."""

    name: str
    owner: int
    others: tuple[int, ...]


def shared_averages(
    ema: EMA | None, program: Program, owned: Sequence[Iterable[str]], held: Sequence[Iterable[str]], buffers: set[str]
) -> list[Shared]:
    """Averages of weights that several ranks hold, in an order that all know. `owned` and `held`: names by rank;
    `buffers`: names of floating-point buffers.
    """
    if ema is None:
        return []
    names = {name for bucket in program.buckets for name in bucket.parameters}
    names.update(program.written)
    names |= buffers if ema.buffers == "average" else set()
    owner = {name: rank for rank, own in enumerate(owned) for name in own}
    holders: dict[str, list[int]] = {}
    for rank, own in enumerate(held):
        for name in names.intersection(own):
            holders.setdefault(name, []).append(rank)
    rows = [Shared(name, owner[name], tuple(r for r in holders[name] if r != owner[name])) for name in sorted(holders)]
    return [row for row in rows if row.others]


def brought(
    averages: Averages, shared: Iterable[Shared], tensors: Mapping[str, Tensor], transport: Transport
) -> dict[str, Tensor]:
    """The averages of all that this rank holds, of `tensors`; all ranks call this together."""
    found, left = dict(averages.values), list[Wait]()
    for row in shared:
        if row.owner == transport.rank:
            value = found[row.name].contiguous()
            left.append(transport.start([(peer, value) for peer in row.others], [])[0])
        else:
            value = found[row.name] = torch.empty_like(_wide(tensors[row.name]), memory_format=torch.contiguous_format)
            transport.start([], [(row.owner, value)])[1]()
    for wait in left:
        wait()
    return found


@contextmanager
def standing_in(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While open `tensors` hold these values; then what they held before."""
    before = {name: tensors[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

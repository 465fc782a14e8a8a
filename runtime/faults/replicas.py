"""Replicas: what several ranks should hold alike in; an error that names what differs, where and since when, out.

- A parameter, or a piece of one, and a buffer are equal on all ranks that hold them whenever no step is under way; so
  are the states of an optimizer, where each of these ranks steps. Ranges of sharded parameters have one holder each.
- A checksum is the sum of a tensor's bits as whole numbers, modulo 2**64: a flipped bit always changes it. Tensors of
  equal numbers have equal checksums, however they lie in memory.
- Each set of ranks adds up the checksums of all that it shares, each times another odd number; these are compared in
  one small sum over all ranks. Only where they differ are those of each name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from spindle.errors import InputError, LostPeerError, ReplicaError
from spindle.runtime.comms.transport import Transport, sum_over_all
from spindle.runtime.programs.program import Program
from spindle.runtime.steps.store import ParameterStore
from spindle.words.whole_numbers import is_whole

CHECK_EVERY = 100
"""Steps. A check reads what an optimizer reads and writes some seven times: far less than 0.5 % of a hundred steps."""

_ODD = 0x9E3779B97F4A7C15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Kind = Literal["parameter", "states"]
Item = tuple[Kind, str]
"""A parameter or buffer, or the optimizer's states of a parameter; by name."""


def steps_between(asked: int | None) -> int:
    """Steps between two checks, as asked for; 0 for none. Raises InputError for less."""
    if asked is not None and not is_whole(asked, 0):
        raise InputError(f"check_replicas_every is {asked!r}; give a number of steps, or 0 for no check")
    return CHECK_EVERY if asked is None else asked


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """What exactly `ranks` hold alike; the `items` are known to these ranks only, `count` to all."""

    ranks: tuple[int, ...]
    items: tuple[Item, ...]
    count: int


def replica_sets(program: Program, held: Sequence[Iterable[str]]) -> list[ReplicaSet]:
    """What ranks hold alike, by the sets of ranks. `held`: names of parameters, pieces and buffers that each holds."""
    holders: dict[Item, list[int]] = {}
    for rank, names in enumerate(held):
        for name in names:
            holders.setdefault(("parameter", name), []).append(rank)
    for bucket in program.buckets:
        if bucket.owner is None:
            holders |= {("states", name): list(bucket.ranks) for name in bucket.parameters}
    found: dict[tuple[int, ...], list[Item]] = {}
    for item, ranks in holders.items():
        if len(ranks) > 1:
            found.setdefault(tuple(sorted(ranks)), []).append(item)
    return [ReplicaSet(ranks, tuple(items), len(items)) for ranks, items in sorted(found.items())]


def sets_of(sets: Sequence[ReplicaSet], rank: int) -> tuple[ReplicaSet, ...]:
    """The same as one rank needs it."""
    return tuple(each if rank in each.ranks else replace(each, items=()) for each in sets)


def checksum(value: Tensor) -> Tensor:
    """The checksum of a tensor, on its device: a number of 64 bits."""
    flat = value.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    words = flat.view(_WORDS[flat.element_size()])
    together = 8 // words.element_size()
    if words.storage_offset() % together:
        words = words.clone()
    whole = len(words) // together * together
    found = words[:whole].view(torch.int64).sum()
    return found + words[whole:].sum(dtype=torch.int64) if whole < len(words) else found


def _mixed(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    """Some checksums as one."""
    if not sums:
        return torch.zeros((), dtype=torch.int64, device=device)
    factors = torch.tensor([_signed((2 * i + 1) * _ODD) for i in range(len(sums))], device=device)
    return (torch.stack([each.to(device) for each in sums]) * factors).sum()


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


class Replicas:
    """Compares what this rank holds with what others hold. All ranks do so together."""

    def __init__(
        self,
        sets: Sequence[ReplicaSet],
        transport: Transport,
        store: ParameterStore,
        optimizer: torch.optim.Optimizer | None,
        every: int,
    ) -> None:
        """`every`: steps between two checks; 0 makes none."""
        self._sets, self._transport, self._store, self._optimizer = sets, transport, store, optimizer
        self._every = every if sets and transport.num_ranks > 1 else 0
        self._equal: int | None = None  # steps after which all were found equal last

    def forget(self) -> None:
        """What ranks hold has been put there anew."""
        self._equal = None

    def look(self, steps_done: int) -> None:
        """Before a step: compare where the last time was `every` steps ago. Raises ReplicaError."""
        if self._every and (self._equal is None or steps_done - self._equal >= self._every):
            self.check(steps_done)

    def check(self, steps_done: int) -> None:
        """Compare now, after `steps_done` steps, unless it was done already. Raises ReplicaError."""
        if not self._every or self._equal == steps_done:
            return
        self._transport.pulse.at("compare replicas", steps_done + 1)
        held = self._held()
        own = [_mixed([self._sum(item, held) for item in each.items], self._device) for each in self._sets]
        table = self._of_all(torch.stack(own).unsqueeze(1))
        for index, each in enumerate(self._sets):
            if len({table[rank][index] for rank in each.ranks}) > 1:
                self._tell(each, held, steps_done)
        self._equal = steps_done

    @property
    def _device(self) -> torch.device:
        return self._transport.device

    def _held(self) -> Mapping[str, Tensor]:
        return self._store.held(name for each in self._sets for kind, name in each.items if kind == "parameter")

    def _sum(self, item: Item, held: Mapping[str, Tensor]) -> Tensor:
        kind, name = item
        if kind == "parameter":
            return checksum(held[name])
        states = self._optimizer.state.get(self._store.parameters[name], {}) if self._optimizer else {}
        values = [states[key] for key in sorted(states, key=str)]
        return _mixed([checksum(value) for value in values if isinstance(value, Tensor)], self._device)

    def _of_all(self, own: Tensor) -> list[list[int]]:
        """The numbers of all ranks, by rank."""
        num_ranks = self._transport.num_ranks
        table = torch.zeros(len(own), num_ranks, dtype=torch.int64, device=self._device)
        table[:, self._transport.rank] = own.flatten()
        sum_over_all(table, self._transport)
        return table.T.tolist()

    def _tell(self, found: ReplicaSet, held: Mapping[str, Tensor], steps_done: int) -> None:
        """Raise the error of a set of ranks of which some differ."""
        sums = [self._sum(item, held) for item in found.items]
        own = torch.stack([each.to(self._device) for each in sums]) if sums else torch.zeros(found.count).long()
        table = self._of_all(own.to(self._device))
        if self._transport.rank not in found.ranks:
            raise LostPeerError(f"ranks {_listed(found.ranks)} no longer hold the same numbers")
        said = []
        for index, item in enumerate(found.items):
            counts = Counter(table[rank][index] for rank in found.ranks)
            (usual, number), *others = counts.most_common()
            if others:
                odd = [rank for rank in found.ranks if table[rank][index] != usual]
                said.append(_sentence(item, found.ranks, odd if number > others[0][1] else ()))
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        since = self._since(steps_done)
        raise ReplicaError(
            f"{said[0]}{more}; {since}. Nothing was stepped or saved with it since it was found: go on from the newest "
            "checkpoint, which was checked; where it comes again test the memory of these machines, or look for code "
            "that changes numbers on some ranks only"
        )

    def _since(self, steps_done: int) -> str:
        if self._equal is None:
            return "so it was when ranks began, before a step of theirs"
        first = self._equal + 1
        steps = f"step {first}" if first == steps_done else f"one of the steps {first} to {steps_done}"
        return f"all were equal after step {self._equal}, so that it began in {steps}"


def _sentence(item: Item, ranks: Sequence[int], odd: Sequence[int]) -> str:
    """What differs where; `odd`: the ranks that differ from most, none where no number is that of most."""
    kind, name = item
    what = f"the optimizer's states of {name!r} differ" if kind == "states" else f"{name!r} differs"
    if odd:
        others = [rank for rank in ranks if rank not in odd]
        return f"{what} on {_listed(odd)} from {_listed(others)}"
    return f"{what} between {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"

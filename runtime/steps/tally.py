"""Tally: what runs add to the running statistics of norm layers in; what one process would have come to out.

A running value becomes (1 - m) r + m x with each batch: from zeros, k batches leave d, and (1 - m)^k r + d is what they
make of any r. So what runs add is folded in afterwards, in the order of one process: task after task, batch after
batch, forward and then what a checkpoint of the model's own runs again in backward. Batches of one rank that follow
each other are taken together first.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from spindle.runtime.programs.program import Program, SliceRun, Tally
from spindle.values.graph import base_task


@dataclass(frozen=True, slots=True)
class Counted:
    """What some batches make of statistics that begin as zeros. Of several layers side by side, `count` is by layer."""

    count: Tensor
    mean: Tensor
    variance: Tensor


Added = MutableMapping[tuple[str, str, int, str], Counted]
"""By layer, run, round, and "forward" or "backward"."""

_Entry = tuple[str, int, str]
"""Run, round, phase."""


class _Buffers(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Like:
    """Layers to which the same ranks add in the same order. `segments`: the rank, and for each of its entries that
    follow each other the entry of each layer.
    """

    layers: tuple[str, ...]
    momentum: float | None
    segments: tuple[tuple[int, tuple[tuple[_Entry, ...], ...]], ...]


class TallyOrder:
    """The order in which contributions to a tally are folded in, and where each stands among all."""

    def __init__(
        self, program: Program, tally: Tally, rank: int, rounds: int, momenta: Mapping[str, float | None]
    ) -> None:
        self.rank = rank
        found: dict[tuple[object, ...], list[tuple[str, list[tuple[int, _Entry]]]]] = {}
        for layer in tally.layers:
            entries = _entries([run for run in program.one_process if layer in run.statistics], rounds)
            key = (momenta[layer], tuple(owner for owner, _ in entries))
            found.setdefault(key, []).append((layer, entries))
        self.likes = [_like(members, momenta[members[0][0]]) for members in found.values() if members[0][1]]

    def packed(self, added: Added, buffers: _Buffers) -> Tensor:
        """What this rank adds, and zeros where others do."""
        parts: list[Tensor] = []
        for like in self.likes:
            sizes = [buffers[f"{layer}.running_mean"].numel() for layer in like.layers]
            zero = buffers[f"{like.layers[0]}.running_mean"].new_zeros((), dtype=torch.float64)
            for owner, entries in like.segments:
                total = Counted(*(zero.new_zeros(n) for n in (len(sizes), sum(sizes), sum(sizes))))
                for entry in entries if owner == self.rank else ():
                    total = _after(total, _joined(like.layers, entry, added, sizes, zero), like.momentum, sizes)
                parts += (total.count, total.mean, total.variance)
        return torch.cat(parts)

    def fold(self, contributions: Tensor, buffers: _Buffers) -> None:
        """Fold what all ranks have added into the statistics."""
        position = 0
        for like in self.likes:
            held = [[buffers[f"{layer}.{part}"] for layer in like.layers] for part in _PARTS]
            sizes = [value.numel() for value in held[0]]
            mean, variance, count = (torch.cat([v.reshape(-1).double() for v in values]) for values in held)
            now = Counted(count, mean, variance)
            for _ in like.segments:
                widths = [len(sizes), sum(sizes), sum(sizes)]
                parts = torch.split(contributions[position : position + sum(widths)], widths)
                now = _after(now, Counted(*parts), like.momentum, sizes)
                position += sum(widths)
            for values, found in zip(held, (now.mean, now.variance, now.count), strict=True):
                for value, part in zip(values, torch.split(found, [v.numel() for v in values]), strict=True):
                    value.copy_(part.view_as(value))


_PARTS = ("running_mean", "running_var", "num_batches_tracked")


def _entries(runs: Sequence[SliceRun], rounds: int) -> list[tuple[int, _Entry]]:
    """Contributions to a layer in the order of one process, each with the rank that makes it."""
    found: list[tuple[int, _Entry]] = []
    for _, of_task in groupby(runs, lambda run: base_task(run.task)):
        batches = [list(batch) for _, batch in groupby(of_task, lambda run: run.task)]
        for number in range(rounds):
            for batch in batches:
                found += [(run.ranks[0], (run.name, number, "forward")) for run in batch]
                found += [(run.ranks[0], (run.name, number, "backward")) for run in reversed(batch) if run.backward]
    return found


def _like(members: Sequence[tuple[str, list[tuple[int, _Entry]]]], momentum: float | None) -> _Like:
    layers = tuple(layer for layer, _ in members)
    owners = [owner for owner, _ in members[0][1]]
    columns = [tuple(entries[index][1] for _, entries in members) for index in range(len(owners))]
    segments = tuple(
        (owner, tuple(columns[index] for index in indices))
        for owner, indices in groupby(range(len(owners)), owners.__getitem__)
    )
    return _Like(layers, momentum, segments)


def _joined(
    layers: Sequence[str], entry: Sequence[_Entry], added: Added, sizes: Sequence[int], zero: Tensor
) -> Counted:
    """What one batch adds to each layer, side by side; nothing where it has no part in it."""
    found = [added.get((layer, *own)) for layer, own in zip(layers, entry, strict=True)]
    none = [zero.new_zeros(size) for size in sizes]
    return Counted(
        torch.stack([zero if one is None else one.count.double() for one in found]),
        torch.cat([empty if one is None else one.mean.double() for one, empty in zip(found, none, strict=True)]),
        torch.cat([empty if one is None else one.variance.double() for one, empty in zip(found, none, strict=True)]),
    )


def _after(before: Counted, more: Counted, momentum: float | None, sizes: Sequence[int]) -> Counted:
    """What statistics become by more batches."""
    total = before.count + more.count
    if momentum is None:  # the mean over all batches so far
        kept = before.count / total.clamp(min=1)
        new = more.count / total.clamp(min=1)
        kept = torch.where(more.count == 0, torch.ones_like(kept), kept)
    else:
        kept, new = (1.0 - momentum) ** more.count, torch.ones_like(total)
    kept, new = (_repeated(value, sizes) for value in (kept, new))
    return Counted(total, before.mean * kept + more.mean * new, before.variance * kept + more.variance * new)


def _repeated(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Each value as often as its count; without a tensor of the counts, which a GPU would have the process wait for."""
    return torch.cat([each.expand(count) for each, count in zip(values.unbind(), counts, strict=True)])

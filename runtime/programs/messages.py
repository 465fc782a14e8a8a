"""Messages: the bounds of a step's batch in; which samples go from which rank to which out, the same on all ranks.

A tensor that is cut goes in pieces, from ranks that hold them to ranks that need them. One that only exists whole comes
from the first rank of the run that makes it, which alone gets its gradients back. A rank without samples takes no part.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spindle.runtime.programs.program import Message, Program, SliceRun, Transfer
from spindle.values.graph import TensorSpec
from spindle.values.units import Bounds, Units, shares

Copy = tuple[tuple[int, ...], Bounds]
"""Ranks that hold one copy of the layers together, and its samples."""


def bounds_of(run: SliceRun, units: Units, costs: Sequence[int] | None = None) -> tuple[Bounds, ...]:
    """The samples that each rank of a run holds of a batch; `costs` of each sample, None: its rows of the run's unit.

    Of a batch with fewer samples than planned the last ranks have fewer or none; of one with more, the last has more.
    """
    size, parts = units.num_samples, run.tensor_parallel
    if run.varies:
        count = len(run.ranks) // parts
        found = units.shares(run.weigh_by, count) if costs is None else shares(units, count, costs)
        return tuple(share for share in found for _ in range(parts))
    planned = run.bounds[-1][1]
    if size == planned:
        return run.bounds
    return tuple((min(low, size), size if high == planned else min(high, size)) for low, high in run.bounds)


def copies(run: SliceRun, bounds: Sequence[Bounds]) -> list[Copy]:
    """The ranks of each copy of a run that has samples, and these."""
    step = run.tensor_parallel
    return [(run.ranks[i : i + step], bounds[i]) for i in range(0, len(run.ranks), step) if bounds[i][0] < bounds[i][1]]


class _Holders:
    """Copies of a run's layers by the samples that they hold, which follow each other."""

    def __init__(self, run: SliceRun, bounds: Sequence[Bounds]) -> None:
        self.copies = copies(run, bounds)
        self._ends = [high for _, (_, high) in self.copies]

    def of(self, low: int, high: int) -> Iterator[tuple[tuple[int, ...], Bounds]]:
        """Copies that hold some of the samples, and which of them."""
        for index in range(bisect_right(self._ends, low), len(self.copies)):
            ranks, (first, last) = self.copies[index]
            if first >= high:
                return
            yield ranks, (max(low, first), min(high, last))


def forward_messages(
    spec: TensorSpec, source: SliceRun, target: SliceRun, held: Sequence[Bounds], wanted: Sequence[Bounds]
) -> Iterator[Message]:
    """The samples each target rank needs, from ranks that hold them; what a rank holds itself included."""
    owners = _Holders(source, held)
    for index, (rank, (low, high)) in enumerate(zip(target.ranks, wanted, strict=True)):
        if low == high:
            continue
        if not spec.rows:
            yield Message(tensor=spec.name, source=source.ranks[0], target=rank, low=0, high=0)
            continue
        for ranks, (first, last) in owners.of(low, high):
            sender = rank if rank in ranks else ranks[index % len(ranks)]
            yield Message(tensor=spec.name, source=sender, target=rank, low=first, high=last)


def gradient_messages(
    spec: TensorSpec, source: SliceRun, target: SliceRun, held: Sequence[Bounds], wanted: Sequence[Bounds]
) -> Iterator[Message]:
    """The gradients each source rank needs, one of the ranks of each copy of the target sending them."""
    readers = _Holders(target, wanted)
    if not spec.rows:
        for ranks, _ in readers.copies:
            yield Message(tensor=spec.name, source=ranks[0], target=source.ranks[0], low=0, high=0)
        return
    for index, (rank, (low, high)) in enumerate(zip(source.ranks, held, strict=True)):
        for ranks, (first, last) in readers.of(low, high) if low < high else ():
            sender = rank if rank in ranks else ranks[index % len(ranks)]
            yield Message(tensor=spec.name, source=sender, target=rank, low=first, high=last)


def transfer_messages(
    specs: Sequence[TensorSpec],
    source: SliceRun,
    target: SliceRun,
    held: Sequence[Bounds],
    wanted: Sequence[Bounds],
    *,
    backward: bool,
) -> tuple[Message, ...]:
    """All messages between ranks from one run to the next, or, `backward`, of the gradients that go back."""
    if (source.ranks, source.tensor_parallel, held) == (target.ranks, target.tensor_parallel, wanted):
        specs = [spec for spec in specs if not spec.rows]  # each rank has the samples that it needs
    if not backward:
        found = [m for spec in specs for m in forward_messages(spec, source, target, held, wanted)]
    else:
        order = {rank: index for index, rank in enumerate(target.ranks)}
        found = [
            message
            for spec in specs
            if spec.needs_grad
            for message in sorted(gradient_messages(spec, source, target, held, wanted), key=lambda m: order[m.source])
        ]
    return tuple(m for m in found if m.source != m.target)


@dataclass(frozen=True)
class StepLayout:
    """How one batch of a task is shared: samples of each rank of each run, and the messages of each transfer."""

    units: Units
    bounds: Mapping[str, tuple[Bounds, ...]]
    messages: Mapping[str, tuple[Message, ...]]


class Layouts:
    """Layouts of the batches of a program's tasks; equal batches share one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[tuple[str, object], StepLayout] = {}

    def of(self, task: str, units: Units, costs: Sequence[int] | None = None) -> StepLayout:
        """The layout of one batch of a task. `costs`: of each sample, for runs whose bounds follow them."""
        runs = self.program.runs_by_task.get(task, ())
        varies = any(run.varies for run in runs)
        key = (task, (tuple(units.counts.items()), tuple(costs or ())) if varies else units.num_samples)
        if key not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            bounds = {run.name: bounds_of(run, units, costs) for run in runs}
            transfers = [t for t in self.program.transfers if t.source in bounds]
            self._known[key] = StepLayout(units, bounds, {t.name: self._messages(t, bounds) for t in transfers})
        found = self._known[key]
        return found if found.units is units else StepLayout(units, found.bounds, found.messages)

    def _messages(self, transfer: Transfer, bounds: Mapping[str, tuple[Bounds, ...]]) -> tuple[Message, ...]:
        ends = (self.program.slice_by_name[transfer.source], self.program.slice_by_name[transfer.target])
        source, target = reversed(ends) if transfer.backward else ends
        if bounds[source.name] == source.bounds and bounds[target.name] == target.bounds:
            return transfer.messages
        specs = [self.program.tensor_by_name[name] for name in target.inputs if name in source.outputs]
        return transfer_messages(
            specs, source, target, bounds[source.name], bounds[target.name], backward=transfer.backward
        )

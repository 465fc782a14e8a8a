"""Waves: the allocation plan of a MetaLevel in, its wavefront schedule out (paper, section 3.4, algorithm 1).

- Propose: tuples by falling remaining time of their MetaOp; each is taken if it still fits. (By falling count, the
  other reading of "as many devices as possible", the plans of our benchmark are 3 % longer.)
- Extend: while devices are free, the MetaOp with most remaining time first grows to its largest valid count that fits.
- Align: the wave ends with its shortest tuple; longer ones are cut to the nearest whole number of layers, at least one.
  The rest goes back with its own count: an extension lasts one wave.
- The paper leaves ties and rounding open; these choices reproduce its Fig. 5b (see tests).
- Levels follow each other with a barrier between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from spindle.planner.curves import Curve
from spindle.planner.problem import Problem
from spindle.planner.usual.allocate import Allocation, Tuple, allocate


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Layers of MetaOp `op` to run on `count` devices; on exactly `devices` when they are named."""

    op: int
    first_layer: int
    num_layers: int
    count: int
    devices: tuple[int, ...] = field(default=())


Waves = tuple[tuple[Piece, ...], ...]
"""Pieces that start together, wave by wave."""


@dataclass(slots=True)
class _Remaining:
    """Tuples of one MetaOp that are not scheduled yet."""

    curve: Curve
    tuples: list[Tuple]
    next_layer: int = 0

    @property
    def time_s(self) -> float:
        return sum(self.curve.time_by_count[t.count] * t.layers for t in self.tuples)

    def take(self, index: int, num_layers: int) -> int:
        """Schedule layers of a tuple; returns the first of them."""
        first = self.next_layer
        self.next_layer += num_layers
        rest = self.tuples[index].layers - num_layers
        self.tuples[index : index + 1] = [Tuple(self.tuples[index].count, rest)] if rest else []
        return first


@dataclass(slots=True)
class _Candidate:
    """A tuple that a wave proposes, and the count to which it grew."""

    op: int
    index: int
    count: int


def paper_waves(problem: Problem) -> Waves:
    """The paper's whole schedule: allocate and slice each MetaLevel, one level after another."""
    waves: list[tuple[Piece, ...]] = []
    for level in problem.levels:
        curves = [problem.curves[op] for op in level]
        allocation = allocate(curves, [problem.layers[op] for op in level], problem.num_devices)
        for wave in slice_waves(curves, allocation.tuples, problem.num_devices):
            waves.append(tuple(_renumbered(piece, level[piece.op]) for piece in wave))
    return tuple(waves)


def level_optimum_s(problem: Problem) -> float:
    """Sum of C* over the MetaLevels: what the paper measures its plans against (no bound: levels may overlap)."""
    allocations: list[Allocation] = [
        allocate([problem.curves[op] for op in level], [problem.layers[op] for op in level], problem.num_devices)
        for level in problem.levels
    ]
    return sum(allocation.optimum_s for allocation in allocations)


def slice_waves(curves: Sequence[Curve], tuples: Sequence[tuple[Tuple, ...]], num_devices: int) -> Waves:
    """Algorithm 1 on one level. At most as many waves as tuples: each wave ends at least one."""
    remaining = [_Remaining(curve, list(of_metaop)) for curve, of_metaop in zip(curves, tuples, strict=True)]
    waves: list[tuple[Piece, ...]] = []
    while any(r.tuples for r in remaining):
        candidates = _propose(remaining, num_devices)
        _extend(candidates, remaining, num_devices)
        waves.append(_align(candidates, remaining))
    return tuple(waves)


def _propose(remaining: list[_Remaining], num_devices: int) -> list[_Candidate]:
    choices = [_Candidate(op, i, t.count) for op, r in enumerate(remaining) for i, t in enumerate(r.tuples)]
    choices.sort(key=lambda c: (-remaining[c.op].time_s, c.op, c.index))
    free, taken, proposed = num_devices, set[int](), list[_Candidate]()
    for choice in choices:
        if choice.count <= free and choice.op not in taken:  # a MetaOp never runs twice at once: paper, eq. 6
            free -= choice.count
            taken.add(choice.op)
            proposed.append(choice)
    return proposed


def _extend(candidates: list[_Candidate], remaining: list[_Remaining], num_devices: int) -> None:
    free = num_devices - sum(c.count for c in candidates)
    for candidate in sorted(candidates, key=lambda c: (-remaining[c.op].time_s, c.op)):
        counts = remaining[candidate.op].curve.counts
        wider = max((n for n in counts if candidate.count < n <= candidate.count + free), default=candidate.count)
        free -= wider - candidate.count
        candidate.count = wider


def _align(candidates: list[_Candidate], remaining: list[_Remaining]) -> tuple[Piece, ...]:
    def time_s(c: _Candidate) -> float:
        return remaining[c.op].curve.time_by_count[c.count]

    span_s = min(time_s(c) * remaining[c.op].tuples[c.index].layers for c in candidates)
    pieces = []
    for c in candidates:
        there = int(remaining[c.op].tuples[c.index].layers)
        num_layers = min(there, max(1, int(span_s / time_s(c) + 0.5)))
        first = remaining[c.op].take(c.index, num_layers)
        pieces.append(Piece(op=c.op, first_layer=first, num_layers=num_layers, count=c.count))
    return tuple(pieces)


def _renumbered(piece: Piece, op: int) -> Piece:
    return Piece(op=op, first_layer=piece.first_layer, num_layers=piece.num_layers, count=piece.count)

"""Waves: the allocation plan of a MetaLevel in, its wavefront schedule out (paper, section 3.4, algorithm 1).

- Propose: tuples in an order; each is taken if it still fits.
- Extend: while devices are free, MetaOps grow to larger valid counts that fit, most remaining time first.
- Align: the wave ends with one of its tuples; the others are cut to whole layers. The rest goes back with its own
  count: an extension lasts one wave.
- Levels follow each other.

The paper leaves order, rounding and ties open. A `Reading` settles them; `PRINTED` reproduces the trace of the paper's
Fig. 5b (see tests). Where it loses most: the wave ends with its shortest tuple, and beside a single layer of a
millisecond all others run one layer too, however long. Other readings let a tiny tuple end early; `paper` takes the
shortest schedule of all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from spindle.planner.baselines.allocate import Allocation, Tuple, allocate
from spindle.planner.baselines.levels import meta_levels
from spindle.planner.costing.curves import Curve
from spindle.planner.problem import Problem

Propose = Literal["remaining", "count"]
Extend = Literal["widest", "turns"]
Align = Literal["shortest", "full", "least"]
Counts = Literal["closest", "dividing"]
PROPOSE: tuple[Propose, ...] = ("remaining", "count")
EXTEND: tuple[Extend, ...] = ("turns", "widest")
MovedS = Callable[[int, int, int], float]
"""Number of a MetaOp, its count before (0: none) and after in; seconds to move it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the paper's algorithm is read where it leaves a choice.

    propose     "remaining": by falling remaining time of the tuple's MetaOp; "count": by falling count, then that
    extend      "widest": a MetaOp grows as far as it can before the next one; "turns": they grow a count each in turn
    align       a wave ends with its shortest tuple ("shortest"); with the one that leaves the smallest share of device
                time idle ("full"); or the one after which least is left: the wave's time plus the longer of the
                longest remaining MetaOp and the remaining device time of each device ("least")
    counts      tuples on the closest valid counts ("closest"); or on the closest that divide the devices ("dividing"),
                so that tuples on 18 or 24 of 32 devices do not keep others out of a wave
    ahead       each wave is the one after which the level ends first when the rest is scheduled by this reading
                (`ahead`)
    """

    propose: Propose
    extend: Extend
    align: Align
    counts: Counts
    ahead: bool = False


PRINTED = Reading(propose="remaining", extend="widest", align="shortest", counts="closest")
_COUNTS: tuple[Counts, ...] = ("closest", "dividing")
_LOOSE: tuple[Align, ...] = ("full", "least")
READINGS: tuple[Reading, ...] = (
    PRINTED,
    *(
        Reading(propose=propose, extend="turns", align=align, counts=counts)
        for propose, align, counts in product(PROPOSE, _LOOSE, _COUNTS)
    ),
    Reading(propose="remaining", extend="turns", align="shortest", counts="closest", ahead=True),
    Reading(propose="remaining", extend="turns", align="shortest", counts="dividing", ahead=True),
    Reading(propose="count", extend="turns", align="full", counts="closest", ahead=True),
)
NEAREST, DOWN = 0.5, 1e-9
AHEAD = 6  # waves whose end is looked for
TOO_LONG = 1.3  # of the wave's span: a MetaOp with a longer layer may wait for the next wave


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveSlice:
    """Layers of MetaOp `op` to run on `count` devices; on exactly `devices` when they are named."""

    op: int
    first_layer: int
    num_layers: int
    count: int
    devices: tuple[int, ...] = field(default=())


Waves = tuple[tuple[WaveSlice, ...], ...]
"""Pieces that start together, wave by wave."""


@dataclass(slots=True)
class _Remaining:
    """Tuples of one MetaOp that are not scheduled yet."""

    curve: Curve
    tuples: list[Tuple]
    next_layer: int = 0
    count: int = 0  # on which it ran last

    @property
    def time_s(self) -> float:
        return sum(self.curve.time_by_count[t.count] * t.layers for t in self.tuples)

    @property
    def area_s(self) -> float:
        """Device-seconds of them."""
        return sum(t.count * self.curve.time_by_count[t.count] * t.layers for t in self.tuples)

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


def _nothing_moves(op: int, before: int, after: int) -> float:
    return 0.0


def paper_waves(problem: Problem, reading: Reading = PRINTED) -> Waves:
    """The paper's whole schedule: allocate and slice each MetaLevel, one level after another."""
    waves: list[tuple[WaveSlice, ...]] = []
    for level in meta_levels(problem):
        curves = [problem.curves[op] for op in level]
        if reading.counts == "dividing":
            curves = [_dividing(curve, problem.num_devices) for curve in curves]
        tuples = allocate(curves, [problem.layers[op] for op in level], problem.num_devices).tuples
        for wave in slice_waves(curves, tuples, problem.num_devices, reading, moved_s=_moved_s(problem, level)):
            waves.append(tuple(_renumbered(item, level[item.op]) for item in wave))
    return tuple(waves)


def _moved_s(problem: Problem, level: Sequence[int]) -> MovedS:
    """Seconds that a MetaOp of a level needs to go on with another count: there and back, inside a node if both fit."""
    cluster = problem.cluster

    def moved_s(op: int, before: int, after: int) -> float:
        num_bytes = problem.metaops[level[op]].output_bytes
        if not num_bytes or before in (0, after):
            return 0.0
        link = cluster.intra_node if max(before, after) <= cluster.devices_per_node else cluster.inter_node
        return 2 * link.transfer_s(num_bytes / min(before, after))

    return moved_s


def level_optimum_s(problem: Problem) -> float:
    """Sum of C* over the MetaLevels: what the paper measures its plans against (no bound: levels may overlap)."""
    allocations: list[Allocation] = [
        allocate([problem.curves[op] for op in level], [problem.layers[op] for op in level], problem.num_devices)
        for level in meta_levels(problem)
    ]
    return sum(allocation.optimum_s for allocation in allocations)


def _dividing(curve: Curve, num_devices: int) -> Curve:
    """The curve on counts that divide the devices; itself where there is none."""
    kept = [(n, t) for n, t in zip(curve.counts, curve.times_s, strict=True) if num_devices % n == 0]
    return Curve(tuple(n for n, _ in kept), tuple(t for _, t in kept)) if kept else curve


def slice_waves(
    curves: Sequence[Curve],
    tuples: Sequence[tuple[Tuple, ...]],
    num_devices: int,
    reading: Reading = PRINTED,
    *,
    moved_s: MovedS = _nothing_moves,
) -> Waves:
    """Algorithm 1 on one level. At most as many waves as tuples: each wave ends at least one."""
    level = _Level([_Remaining(curve, list(t)) for curve, t in zip(curves, tuples, strict=True)], num_devices, moved_s)
    waves: list[tuple[WaveSlice, ...]] = []
    while level.is_left:
        cut = _best_ahead(level, reading) if reading.ahead else _next(level, reading)
        waves.append(level.run(cut))
    return tuple(waves)


@dataclass(slots=True)
class _Cut:
    """A wave: its candidates, the layers that each runs, and how long it takes."""

    candidates: Sequence[_Candidate]
    layers: tuple[int, ...]
    span_s: float

    @property
    def key(self) -> tuple[tuple[int, int, int, int], ...]:
        """What it runs."""
        rows = zip(self.candidates, self.layers, strict=True)
        return tuple((c.op, c.index, c.count, n) for c, n in rows if n)


@dataclass(slots=True)
class _Level:
    """What is left of a level."""

    remaining: list[_Remaining]
    num_devices: int
    moved_s: MovedS

    @property
    def is_left(self) -> bool:
        """Whether any tuple is."""
        return any(r.tuples for r in self.remaining)

    def run(self, cut: _Cut) -> tuple[WaveSlice, ...]:
        """Schedule a wave."""
        items = []
        for c, num_layers in zip(cut.candidates, cut.layers, strict=True):
            if num_layers:
                own = self.remaining[c.op]
                own.count = c.count
                first = own.take(c.index, num_layers)
                items.append(WaveSlice(op=c.op, first_layer=first, num_layers=num_layers, count=c.count))
        return tuple(items)

    def copy(self) -> "_Level":
        """One whose waves leave this one as it is."""
        remaining = [_Remaining(r.curve, list(r.tuples), r.next_layer, r.count) for r in self.remaining]
        return _Level(remaining, self.num_devices, self.moved_s)


def _next(level: _Level, reading: Reading) -> _Cut:
    """The wave that a reading asks for."""
    wave = _wave(level, reading)
    if reading.align == "shortest":
        return wave.cut(wave.rounded(min(wave.spans_s), NEAREST))
    return min(wave.cuts(), key=wave.idle_share if reading.align == "full" else wave.end_s)


def _best_ahead(level: _Level, reading: Reading) -> _Cut:
    """Of the waves after which least is left, the one after which the reading ends the level first."""
    found: dict[tuple[tuple[int, int, int, int], ...], tuple[float, _Cut]] = {}
    for propose, extend in product(PROPOSE, EXTEND):
        wave = _wave(level, replace(reading, propose=propose, extend=extend))
        for cut in wave.cuts():
            found.setdefault(cut.key, (wave.end_s(cut), cut))
    promising = sorted(found.values(), key=lambda pair: pair[0])[:AHEAD]
    return min((cut for _, cut in promising), key=lambda cut: _end_s(level, cut, reading))


def _end_s(level: _Level, cut: _Cut, reading: Reading) -> float:
    """Seconds to the end of the level, when it goes on with `cut` and then as the reading asks."""
    rest, end_s = level.copy(), cut.span_s
    rest.run(cut)
    while rest.is_left:
        following = _next(rest, reading)
        rest.run(following)
        end_s += following.span_s
    return end_s


def _wave(level: _Level, reading: Reading) -> "_Wave":
    candidates = _propose(level.remaining, level.num_devices, reading)
    _extend(candidates, level.remaining, level.num_devices, reading)
    return _Wave(candidates, level)


def _propose(remaining: list[_Remaining], num_devices: int, reading: Reading) -> list[_Candidate]:
    choices = [_Candidate(op, i, t.count) for op, r in enumerate(remaining) for i, t in enumerate(r.tuples)]
    left_s = [r.time_s for r in remaining]
    by_count = reading.propose == "count"
    choices.sort(key=lambda c: (-c.count if by_count else 0, -left_s[c.op], c.op, c.index))
    free, taken, proposed = num_devices, set[int](), list[_Candidate]()
    for choice in choices:
        if choice.count <= free and choice.op not in taken:  # a MetaOp never runs twice at once: paper, eq. 6
            free -= choice.count
            taken.add(choice.op)
            proposed.append(choice)
    return proposed


def _extend(candidates: list[_Candidate], remaining: list[_Remaining], num_devices: int, reading: Reading) -> None:
    free = num_devices - sum(c.count for c in candidates)
    ordered = sorted(candidates, key=lambda c: (-remaining[c.op].time_s, c.op))
    grows = True
    while grows and free:
        grows = False
        for candidate in ordered:
            counts = remaining[candidate.op].curve.counts
            larger = [n for n in counts if candidate.count < n <= candidate.count + free]
            if larger:
                count = larger[0] if reading.extend == "turns" else larger[-1]
                free -= count - candidate.count
                candidate.count, grows = count, True


class _Wave:
    """Candidates of one wave, and what each way to cut them is worth."""

    def __init__(self, candidates: Sequence[_Candidate], level: _Level) -> None:
        self.candidates, self.level = candidates, level
        owners = [level.remaining[c.op] for c in candidates]
        rows = list(zip(owners, candidates, strict=True))
        self.layer_s = [own.curve.time_by_count[c.count] for own, c in rows]
        self.there = [int(own.tuples[c.index].layers) for own, c in rows]
        self.moved_s = [level.moved_s(c.op, own.count, c.count) for own, c in rows]
        self.tuple_count = [own.tuples[c.index].count for own, c in rows]
        self.tuple_s = [own.curve.time_by_count[n] for own, n in zip(owners, self.tuple_count, strict=True)]
        self.left_s = [r.time_s for r in level.remaining]
        self.left_area_s = sum(r.area_s for r in level.remaining)

    @property
    def spans_s(self) -> list[float]:
        """How long each candidate's whole tuple takes."""
        return [time_s * n for time_s, n in zip(self.layer_s, self.there, strict=True)]

    def rounded(self, span_s: float, rounding: float) -> tuple[int, ...]:
        """Layers of each candidate in so long a wave, at least one."""
        rows = zip(self.layer_s, self.there, strict=True)
        return tuple(min(n, max(1, int(span_s / time_s + rounding))) for time_s, n in rows)

    def cut(self, layers: tuple[int, ...]) -> _Cut:
        """The wave in which each candidate runs its number of layers."""
        rows = zip(self.moved_s, self.layer_s, layers, strict=True)
        return _Cut(self.candidates, layers, max(moved_s + time_s * n for moved_s, time_s, n in rows if n))

    def cuts(self) -> Iterator[_Cut]:
        """The wave ends with each of its tuples; others are rounded or cut; those whose one layer is longer wait."""
        for span_s in dict.fromkeys(self.spans_s):
            for rounding in (NEAREST, DOWN):
                layers = self.rounded(span_s, rounding)
                yield self.cut(layers)
                fits = [time_s <= span_s * TOO_LONG for time_s in self.layer_s]
                if not all(fits):
                    yield self.cut(tuple(n if there else 0 for n, there in zip(layers, fits, strict=True)))

    def idle_share(self, cut: _Cut) -> float:
        """Share of the wave's device time in which nothing runs."""
        busy_s = sum(c.count * t * n for c, t, n in zip(self.candidates, self.layer_s, cut.layers, strict=True))
        return 1 - busy_s / (self.level.num_devices * cut.span_s)

    def end_s(self, cut: _Cut) -> float:
        """The least time to the end of the level when the wave runs so."""
        left_s, area_s = self.left_s[:], self.left_area_s
        for c, count, time_s, n in zip(self.candidates, self.tuple_count, self.tuple_s, cut.layers, strict=True):
            left_s[c.op] -= time_s * n
            area_s -= count * time_s * n
        return cut.span_s + max(area_s / self.level.num_devices, *left_s)


def _renumbered(item: WaveSlice, op: int) -> WaveSlice:
    return WaveSlice(op=op, first_layer=item.first_layer, num_layers=item.num_layers, count=item.count)

"""Trials: recordings of some samples, whole and in parts, in; along what each value may be cut, out."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from spindle.capture.facts import Samples, Slot, apart, by_sample
from spindle.capture.grouping import Key, Wired
from spindle.capture.look.watching import Changes
from spindle.inputs.batch import SampledBatch
from spindle.record.run import Recorded
from spindle.record.substitutes.draws import Site
from spindle.values.units import SAMPLES, Bounds, Place, Units


@dataclass(frozen=True)
class Part:
    """A recording of samples `bounds` of a batch, as in step `step`, and the shapes of what was drawn: by scope, "" for
    the glue.
    """

    bounds: Bounds
    wired: Wired
    draws: Mapping[str, Sequence[tuple[int, ...]]]
    step: int = 0


@dataclass(frozen=True)
class Trial:
    """Recordings of some samples of one batch: together, and in parts. `variant`: what its numbers are that layers are
    to be looked at with.
    """

    batch: SampledBatch
    whole: Part
    parts: tuple[Part, ...]
    variant: str = ""

    @property
    def units(self) -> Units:
        """How many rows of each unit each sample has."""
        return self.batch.units

    @cached_property
    def apart(self) -> frozenset[Slot]:
        """Where calls take something else for a part of the samples than for all of them."""
        nodes, whole = self.whole.wired.live_nodes(), self._samples(self.whole)
        return frozenset(
            slot for part in self.parts for slot in apart(nodes, part.wired.live_nodes(), whole, self._samples(part))
        )

    @property
    def by_sample(self) -> dict[Slot, float]:
        """Of each place in the code, how many calls a sample makes; 0 where calls are of the batch. Where the parts are
        all samples, else nothing.
        """
        if not self.covers or len(self.parts) < 2:
            return {}
        low, high = self.whole.bounds
        return by_sample(self.whole.wired.live_nodes(), [part.wired.live_nodes() for part in self.parts], high - low)

    @property
    def covers(self) -> bool:
        """Whether the parts together are all the samples."""
        return (
            sum(part.bounds[1] - part.bounds[0] for part in self.parts) == self.whole.bounds[1] - self.whole.bounds[0]
        )

    def cut(self, value: Tensor, part: Part, place: Place) -> Tensor:
        """The rows of a part in a value of all samples. Raises ValueError where they do not divide evenly."""
        unit, dim = place
        return value.narrow(dim, *self.units.span(unit, value.shape[dim], self.whole.bounds, part.bounds))

    def _samples(self, part: Part) -> Samples:
        return Samples(part.wired.recording.aux, self.units, part.bounds)

    def goes_the_same_way(self, other: "Trial") -> bool:
        """Whether the same code runs in another trial, on tensors of the same types and numbers of dimensions."""
        pairs = zip((self.whole, *self.parts), (other.whole, *other.parts), strict=True)
        return all(_way(a.wired) == _way(b.wired) for a, b in pairs)


def _way(wired: Wired) -> object:
    recording = wired.recording
    nodes = [
        (node.block or node.site, [(len(recording.shapes[out]), recording.dtypes[out]) for out in node.outs])
        for node in recording.nodes
    ]
    return wired.live, nodes


@dataclass
class Findings:
    """What is known of a task's values.

    `places`: for each key of glue or name of a block call, and each of its results, the units and dimensions along
    which it may be cut; () when it cannot. `constant`: keys whose results are the same for all samples. `mixing`: keys
    that mix samples, `mixing_blocks` block calls that do; `changes`: what block calls change besides their results.
    """

    places: dict[object, list[tuple[Place, ...]]] = field(default_factory=dict)
    constant: set[object] = field(default_factory=set)
    mixing: set[Key] = field(default_factory=set)
    mixing_blocks: set[str] = field(default_factory=set)
    changes: dict[str, Changes] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What capture saw of a task: the recording of its first batch, and of some samples of it. `others`: recordings of
    other samples, which may run other code. `read`: buffers that it reads as constants outside of blocks; `apart`:
    where calls took something else for a part of a batch than for the whole; `by_sample`: how many a sample makes.
    """

    batch: SampledBatch
    whole: Recorded
    few: Recorded
    few_bounds: Bounds
    findings: Findings
    sites: Mapping[str, tuple[Site, ...]]
    stateful: frozenset[str]
    copies_batch: bool
    others: tuple[Wired, ...] = ()
    read: frozenset[str] = frozenset()
    apart: frozenset[Slot] = frozenset()
    by_sample: Mapping[Slot, float] = field(default_factory=dict)


def places_of(trials: Sequence[Trial]) -> dict[object, list[tuple[Place, ...]]]:
    """Where each result of each key of glue and each block call may be cut, by shapes."""
    found: dict[object, list[tuple[Place, ...] | None]] = {}  # None: only seen without entries, which tell nothing
    for trial in trials:
        whole = _results(trial.whole.wired)
        parts = [_results(part.wired) for part in trial.parts]
        for key, calls in whole.items():
            others = [part.get(key, []) for part in parts]
            width = len(calls[0])
            if any(len(other) != len(calls) for other in others) or any(len(c) != width for c in calls):
                found[key] = [() for _ in range(width)]
                continue
            for index in range(width):
                for number, call in enumerate(calls):
                    shapes = [other[number][index] if index < len(other[number]) else () for other in others]
                    here = None if 0 in call[index] else _candidates(call[index], shapes, trial)
                    slots = found.setdefault(key, [])
                    slots += [None] * (index + 1 - len(slots))
                    was = slots[index]
                    slots[index] = here if was is None else tuple(p for p in was if here is None or p in here)
    return {key: [slot or () for slot in slots] for key, slots in found.items()}


def _results(wired: Wired) -> dict[object, list[list[tuple[int, ...]]]]:
    """Shapes of results by key, one list a call."""
    found: dict[object, list[list[tuple[int, ...]]]] = defaultdict(list)
    recording = wired.recording
    for number in (*wired.glue(), *wired.blocks()):
        node = recording.nodes[number]
        found[node.block or wired.key(number)].append([recording.shapes[out] for out in node.outs])
    return found


def _candidates(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]], trial: Trial) -> tuple[Place, ...]:
    """Units and dimensions whose rows explain the sizes of all parts."""
    return tuple(
        (unit, dim)
        for dim in range(len(whole))
        for unit in (SAMPLES, *(u for u in trial.units.counts if u != SAMPLES))
        if whole[dim]
        and any(part[:dim] + part[dim + 1 :] == whole[:dim] + whole[dim + 1 :] for part in parts if len(part) > dim)
        and all(_explains(unit, dim, whole, part, piece, trial) for part, piece in zip(parts, trial.parts, strict=True))
    )


def _explains(unit: str, dim: int, whole: tuple[int, ...], part: tuple[int, ...], piece: Part, trial: Trial) -> bool:
    if len(part) != len(whole) or part[:dim] + part[dim + 1 :] != whole[:dim] + whole[dim + 1 :]:
        return False
    return trial.units.rows(unit, *trial.whole.bounds) > 0 and fits(trial, unit, whole[dim], part[dim], piece)


def fits(trial: Trial, unit: str, whole: int, own: int, part: Part) -> bool:
    """Whether `own` entries are the share of a part's rows of `unit` in the `whole` entries of all."""
    total = trial.units.rows(unit, *trial.whole.bounds)
    return own * total == whole * trial.units.rows(unit, *part.bounds)


def sites_of(trials: Sequence[Trial]) -> dict[str, tuple[Site, ...]]:
    """Of each scope that draws, along which unit and dimension the samples of each draw lie."""
    found: dict[str, tuple[Site, ...]] = {}
    for scope in dict.fromkeys(scope for trial in trials for scope, shapes in trial.whole.draws.items() if shapes):
        sites: list[Site] = []
        for index in range(max(len(trial.whole.draws.get(scope, ())) for trial in trials)):
            seen: tuple[Place, ...] | None = None
            shape: tuple[int, ...] = ()
            for trial in trials:
                shapes = [piece.draws.get(scope, ()) for piece in (trial.whole, *trial.parts)]
                if any(len(s) <= index for s in shapes):
                    continue
                shape = shapes[0][index]
                here = _candidates(shape, [s[index] for s in shapes[1:]], trial)
                seen = here if seen is None else tuple(p for p in seen if p in here)
            sites.append(Site(seen[0][1], 0, (), seen[0][0]) if seen else Site(-1, 0, shape))
        found[scope] = tuple(sites)
    return found


def spread_mixing(wired: Wired, findings: Findings) -> None:
    """Glue that reads glue which mixes samples counts as mixing too, up to the next block."""
    nodes = wired.recording.nodes
    changed = True
    while changed:
        changed = False
        for n in wired.glue():
            key = wired.key(n)
            if key in findings.mixing:
                continue
            reads = (s for s in wired.sources[n] if s not in wired.repeated and not nodes[s].block)
            if any(wired.key(s) in findings.mixing for s in reads):
                findings.mixing.add(key)
                changed = True


def place_of(findings: Findings, key: object, index: int) -> Place | None:
    """How result `index` of a key or block call is cut; None when it only exists whole."""
    places = findings.places.get(key, [])
    return places[index][0] if index < len(places) and places[index] else None

"""Model: a Problem in, the plain numbers that the search works on out; also reversed in time.

A schedule of the reversed model, read from its end, is a schedule of the model: the search tries both directions, since
what is hard to fit stands at the end in one and at the beginning in the other.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from spindle.planner.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Model:
    """Numbers by MetaOp.

    counts, times   valid counts, rising, and seconds of one layer at each; then, in `times` no faster, the idle ones
    useful          how many of them are not idle
    hull            indices of the counts on the concave envelope of the rate: those an LP would mix
    bound_s         no schedule is shorter
    is_reversed     whether time runs backwards
    """

    num_devices: int
    layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    times: tuple[tuple[float, ...], ...]
    useful: tuple[int, ...]
    hull: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    bound_s: float
    is_reversed: bool = False

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def fastest_s(self) -> tuple[float, ...]:
        """Seconds of one layer of each MetaOp at the count that is fastest."""
        return tuple(times[useful - 1] for times, useful in zip(self.times, self.useful, strict=True))

    @cached_property
    def tail_s(self) -> tuple[float, ...]:
        """Least seconds from the end of each MetaOp to the end of everything."""
        tail = [0.0] * len(self)
        for m in reversed(self.order):
            tail[m] = max((tail[s] + self.layers[s] * self.fastest_s[s] for s in self.after[m]), default=0.0)
        return tuple(tail)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """How many MetaOps stand before each, on the longest chain."""
        level = [0] * len(self)
        for m in self.order:
            level[m] = max((level[p] + 1 for p in self.before[m]), default=0)
        return tuple(level)

    @cached_property
    def total_layers(self) -> int:
        """Layers of all MetaOps."""
        return sum(self.layers)

    @cached_property
    def reversed(self) -> "Model":
        """The same with time running backwards."""
        return replace(
            self, before=self.after, after=self.before, order=self.order[::-1], is_reversed=not self.is_reversed
        )


def make_model(problem: Problem, bound_s: float) -> Model:
    """The numbers of a Problem."""
    return Model(
        num_devices=problem.num_devices,
        layers=problem.layers,
        counts=tuple(curve.counts + tuple(n for n, _ in curve.idle) for curve in problem.curves),
        times=tuple(curve.times_s + tuple(t for _, t in curve.idle) for curve in problem.curves),
        useful=tuple(len(curve.counts) for curve in problem.curves),
        hull=tuple(tuple(curve.counts.index(n) for n in curve.hull.counts) for curve in problem.curves),
        before=problem.predecessors,
        after=problem.successors,
        order=problem.order,
        bound_s=bound_s,
    )

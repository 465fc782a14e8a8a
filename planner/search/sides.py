"""Sides: a model in, beams of both directions of time out, wider and wider, by different orders of waves.

The direction that did better so far gets two runs of three. Beams go on without end: who runs them stops them, and
goes on later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

from spindle.planner.search.beam import Beam, Found, Width
from spindle.planner.search.device_pool import DevicePool
from spindle.planner.search.finish import forward_on_pool, forward_runs
from spindle.planner.search.list_scheduler import Run
from spindle.planner.search.model import Model
from spindle.planner.search.orders import by_level, by_schedule, by_search
from spindle.planner.search.work import Work

ROLL_OUT = Width(1, 1, 1)  # one LP and one simulation: the least that gives a schedule
LADDER = (
    ROLL_OUT,
    Width(1, 3, 6),
    Width(1, 6, 12),
    Width(3, 10, 20),
    Width(8, 10, 20),
    Width(16, 10, 24),
    Width(32, 10, 24),
)
SMALL = 90  # MetaOps up to which the order of waves is searched, and annealing makes enough moves
ORDER_SHARE = 0.1  # of the work so far that a search for an order may take
SAME_ORDER_WAVES = 8


@dataclass(slots=True)
class Side:
    """One direction of time."""

    model: Model
    beam: Beam
    rounds: int = 0
    turned: dict[int, tuple[Found, Found]] = field(default_factory=dict)  # by id: the beam's best, and what they became
    guide: Sequence[Run] = ()  # a schedule expected to be good, whose order the first beam takes

    @property
    def found(self) -> list[Found]:
        """The best schedules; on a pool, what runs backwards as what it is forwards."""
        pool = self.beam.pool
        if pool is None or not self.model.is_reversed:
            return list(self.beam.best)
        for f in self.beam.best:
            if id(f) not in self.turned:
                self.turned[id(f)] = f, _turned(pool.reversed, f)
        return [turned for _, turned in self.turned.values()]

    @property
    def best_s(self) -> float:
        """Makespan of the best."""
        return min((f.makespan_s for f in self.found), default=inf)


def _turned(pool: DevicePool, f: Found) -> Found:
    """A schedule of the reversed model with forward times, transfers charged to who receives."""
    runs = forward_on_pool(pool.problem, pool, f.model, f.runs)
    return Found(max(end for _, _, _, _, end, _ in runs), runs, f.model.reversed)


def both_sides(model: Model, pool: DevicePool | None, work: Work, guide: Sequence[Run]) -> list[Side]:
    """Forward and backward."""
    back, backward = model.reversed, pool.reversed if pool else None
    return [
        Side(model, Beam(model, pool, work), guide=guide),
        Side(back, Beam(back, backward, work), guide=forward_runs(back, list(guide)) if guide else ()),
    ]


def beams(sides: Sequence[Side], work: Work, seed: int) -> Iterator[None]:
    """Beam after beam; whoever iterates decides when it is enough."""
    for turn in count():
        side = sides[turn % 2] if turn < 4 else _chosen(sides, turn)
        width = LADDER[min(turn // 2, len(LADDER) - 1)]
        yield from side.beam.search(_order(side, work, seed + turn), width, seed + turn)
        side.rounds += 1
        yield


def _chosen(sides: Sequence[Side], turn: int) -> Side:
    best, other = sorted(sides, key=lambda s: s.best_s)
    return best if turn % 3 else other


def _order(side: Side, work: Work, seed: int) -> list[int]:
    """First waves of the MetaOps for the next beam."""
    model = side.model
    if side.guide and not side.rounds:
        return by_schedule(model, side.guide, SAME_ORDER_WAVES)
    kind = max(0, side.rounds - 1) % 3  # the roll-out was the first
    if kind == 1 and side.beam.best:
        return by_schedule(model, side.beam.best[0].runs, SAME_ORDER_WAVES)
    if kind == 2 and len(model) <= SMALL:
        return by_search(model, side.beam.lp, work, ORDER_SHARE * work.spent, seed)
    return by_level(model)

"""Sides: a model in, beams of both directions of time out, wider and wider, by different orders of waves.

The direction that did better so far gets two runs of three. Beams are made one simulation at a time, so that who runs
them can stop anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from spindle.planner.search.beam import Beam, Found, Width
from spindle.planner.search.device_pool import DevicePool
from spindle.planner.search.finish import forward_on_pool, forward_runs
from spindle.planner.search.list_scheduler import DECISION_UNITS, EVENT_UNITS, MOST_DECIDING, Run
from spindle.planner.search.model import Model
from spindle.planner.search.orders import by_level, by_schedule, by_search
from spindle.planner.search.wave_lp import COLUMN_UNITS, LP_UNITS
from spindle.planner.work import Work

ROLL_OUT = Width(1, 1, 1)  # one LP and one simulation: the least that gives a schedule
LADDER = (Width(1, 3, 6), Width(1, 6, 12), Width(3, 10, 20), Width(8, 10, 20), Width(16, 10, 24), Width(32, 10, 24))
SPARE, SPARE_WIDE = 1.2, 0.6  # of what a beam of one state, of several, is expected to take, that must be left for it
HUGE = 400  # MetaOps from which on most wait at each decision
SMALL = 90  # MetaOps up to which the order of waves is searched, and annealing makes enough moves
ORDER_SHARE = 0.05  # of the work so far that a search for an order may take
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


class Sides:
    """Both directions, and how many beams there were."""

    def __init__(self, model: Model, pool: DevicePool | None, work: Work, seed: int, guide: Sequence[Run]) -> None:
        back, backward = model.reversed, pool.reversed if pool else None
        self.work, self.seed, self.turn = work, seed, 0
        self.factor = pool.simulation_factor if pool else 1.0
        self.both = (
            Side(model, Beam(model, pool, work), guide=guide),
            Side(back, Beam(back, backward, work), guide=forward_runs(back, list(guide)) if guide else ()),
        )

    @property
    def found(self) -> list[Found]:
        """The best schedules of both."""
        return [f for side in self.both for f in side.found]

    @property
    def best_s(self) -> float:
        """Makespan of the best."""
        return min(side.best_s for side in self.both)

    def roll_out(self) -> Iterator[None]:
        """The least that gives a schedule, in each direction."""
        for _ in self.both:
            yield from self._beam(ROLL_OUT, inf)

    def beams(self, until: float) -> Iterator[None]:
        """Beams that are expected to end before so much work is done, the widest such once narrower ones have run.

        After one of several states none that are much narrower, which find less.
        """
        least = 0
        while self.work.spent < until:
            left = until - self.work.spent
            affordable = [width for width in LADDER if self._units(width) <= left]
            if len(affordable) <= least:
                return
            width = affordable[: self.turn // 2][-1]
            if width.states > 1:
                least = max(least, LADDER.index(width) - 1)
            yield from self._beam(width, until)

    def _units(self, width: Width) -> float:
        """What must be left for a beam: most states of a wide one win nothing and end."""
        spare = SPARE if width.states == 1 else SPARE_WIDE
        return spare * beam_units(self.both[0].model, width, self.factor)

    def _beam(self, width: Width, until: float) -> Iterator[None]:
        turn, seed = self.turn, self.seed + self.turn
        side = self.both[turn % 2] if turn < 4 else self._chosen(turn)
        self.turn += 1
        yield from side.beam.search(_order(side, self.work, seed), width, seed, until)
        side.rounds += 1
        yield  # also where the wave LP could not be solved

    def _chosen(self, turn: int) -> Side:
        best, other = sorted(self.both, key=lambda side: side.best_s)
        return best if turn % 3 else other


def beam_units(model: Model, width: Width, factor: float) -> float:
    """What a beam is expected to spend."""
    lp = LP_UNITS + COLUMN_UNITS * 0.6 * sum(map(len, model.hull))
    waiting = MOST_DECIDING // 2 if len(model) > HUGE else 1
    whole_run = (DECISION_UNITS * waiting + EVENT_UNITS) * model.total_layers * factor
    return width.states * width.heuristics * (width.epochs * lp + whole_run * (1 + width.epochs / 4))


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

"""Run: a Problem and a time limit in, the best schedules found out.

1. Beams on the model and on the reversed one, wider and wider, by different orders of waves; the direction that did
   better so far gets two runs of three.
2. Late acceptance from the best schedules of both directions: each gets a little work, the better half goes on, until
   one is left with the rest of the budget.
"""

from dataclasses import dataclass

from spindle.planner.search.beam import Beam, Found, Width
from spindle.planner.search.decode import draft_of
from spindle.planner.search.floor import Floor
from spindle.planner.search.fluid import COLUMN_UNITS, LP_UNITS
from spindle.planner.search.improve import Climber
from spindle.planner.search.model import Model
from spindle.planner.search.orders import by_level, by_schedule, by_search
from spindle.planner.search.track import DECISION_UNITS, EVENT_UNITS
from spindle.planner.search.work import Work

LADDER = (Width(1, 3, 6), Width(1, 6, 12), Width(3, 10, 20), Width(8, 10, 20), Width(16, 10, 24), Width(32, 10, 24))
BEAM_SHARE = 0.55
STARTS = 6
SMALL = 90
CLOSE_ENOUGH = 0.0005


@dataclass(slots=True)
class _Side:
    """One direction of time."""

    model: Model
    beam: Beam
    rounds: int = 0

    @property
    def best_s(self) -> float:
        return self.beam.best[0].makespan_s if self.beam.best else float("inf")


def search(model: Model, floor: Floor | None, work: Work, *, seed: int = 0) -> list[tuple[Model, Climber]]:
    """Climbers, best first."""
    sides = [_Side(m, Beam(m, floor, work)) for m in (model, model.reversed)]
    _beams(sides, work, seed)
    starts = sorted((f for side in sides for f in side.beam.best), key=lambda f: f.makespan_s)
    climbers = _climb(starts, work, seed)
    return [(c.model, c) for c in climbers]


def _close(model: Model, makespan_s: float) -> bool:
    return makespan_s <= model.bound_s * (1 + CLOSE_ENOUGH)


def beam_units(model: Model, width: Width) -> float:
    """What a beam is expected to spend."""
    columns = sum(map(len, model.hull)) * 1.2
    lp = LP_UNITS + COLUMN_UNITS * columns / 2
    whole_run = (DECISION_UNITS + EVENT_UNITS) * model.total_layers
    return width.states * width.styles * (width.epochs * lp + whole_run * (1 + width.epochs / 4))


def _beams(sides: list[_Side], work: Work, seed: int) -> None:
    turn = 0
    most = 2
    while True:
        side = sides[turn % 2] if turn < 2 else min(sides, key=lambda s: s.best_s) if turn % 3 else max(
            sides, key=lambda s: s.best_s
        )
        left = work.left(BEAM_SHARE)
        if turn > 1 and (not left or _close(side.model, min(s.best_s for s in sides))):
            return
        affordable = [w for w in LADDER if beam_units(side.model, w) <= left / (3 if turn < 2 else 1.5)]
        if turn > 1 and not affordable:
            return
        width = affordable[: most + 1][-1] if affordable else LADDER[0]
        side.beam.search(_order(side, work, seed + turn), width, seed + turn, 1.0 if turn < 2 else BEAM_SHARE)
        side.rounds += 1
        turn += 1
        if turn > 1 and turn % 2 == 0:
            most += 1


def _order(side: _Side, work: Work, seed: int) -> list[int]:
    model = side.model
    kind = side.rounds % 3
    if kind == 1 and side.beam.best:
        return by_schedule(model, side.beam.best[0].runs, 8)
    if kind == 2 and len(model) <= SMALL:
        return by_search(model, side.beam.lp, work, 0.03 * work.total, seed)
    return by_level(model)


def _climb(starts: list[Found], work: Work, seed: int) -> list[Climber]:
    count = STARTS if len(starts[0].model) <= SMALL else 2
    climbers = [Climber(f.model, draft_of(f.model, f.runs), work, seed + i) for i, f in enumerate(starts[:count])]
    while True:
        climbers.sort(key=lambda c: c.best.makespan_s)
        left = work.left()
        if not left or _close(climbers[0].model, climbers[0].best.makespan_s):
            return climbers
        if len(climbers) == 1:
            climbers[0].run(left)
            return climbers
        each = 0.35 * left / len(climbers)
        for climber in climbers:
            climber.run(each)
        climbers.sort(key=lambda c: c.best.makespan_s)
        del climbers[(len(climbers) + 1) // 2 :]

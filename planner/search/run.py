"""Run: a Problem and a budget of work in, the best schedules found out.

1. Beams on the model and on the reversed one, wider and wider, by different orders of waves; the direction that did
   better so far gets two runs of three.
2. Annealing of the best schedules of both directions: each gets a little work, the better half goes on, until
   one is left with the rest of the budget. Without traffic a reversed schedule is improved in reversed time; with it,
   it is first read forward, since transfers are charged to who receives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

from spindle.planner.problem import Problem
from spindle.planner.search.beam import Beam, Found, Width
from spindle.planner.search.decode import HOLDING_PASSES, SLICE_UNITS, Decoder, Draft, FlatDecoder, draft_of
from spindle.planner.search.device_pool import DevicePool, make_device_pool
from spindle.planner.search.finish import finish, forward_on_pool, forward_runs, runs_of_draft
from spindle.planner.search.improve import Annealer
from spindle.planner.search.list_scheduler import DECISION_UNITS, EVENT_UNITS, MOST_DECIDING, Run, Stuck
from spindle.planner.search.model import Model, make_model
from spindle.planner.search.orders import by_level, by_schedule, by_search
from spindle.planner.search.placed import PlacedDecoder
from spindle.planner.search.wave_lp import COLUMN_UNITS, LP_UNITS
from spindle.planner.work import Work
from spindle.values.plan import Slice

LADDER = (Width(1, 3, 6), Width(1, 6, 12), Width(3, 10, 20), Width(8, 10, 20), Width(16, 10, 24), Width(32, 10, 24))
ROLL_OUT = Width(1, 1, 1)  # one LP and one simulation: the least that gives a schedule
HUGE = 400  # MetaOps from which on most wait at each decision
SMALL = 90  # MetaOps up to which the local search makes enough moves to be worth half the budget
BEAM_SHARE, BEAM_SHARE_LARGE = 0.55, 0.9
BLIND_SHARE = 0.2  # of the beams' work, where devices matter: beams that only count them
CLOSE_CALL = 1.01
STARTS, STARTS_LARGE = 6, 3
OUTSIDE_UNITS = 3000.0  # for each MetaOp beyond SMALL: the baselines, and finishing and costing what is found
CLOSE_ENOUGH = 0.0005


@dataclass(slots=True)
class _Side:
    """One direction of time."""

    model: Model
    beam: Beam
    rounds: int = 0
    found: list[Found] = field(default_factory=list)
    turned: dict[int, tuple[Found, Found]] = field(default_factory=dict)  # by id: the beam's best, and what they became
    guide: Sequence[Run] = ()  # a schedule expected to be good, whose order the first beam takes

    def search(self, first: list[int], width: Width, seed: int, share: float) -> None:
        """One more beam; on a pool, what runs backwards counts for what it takes forwards."""
        self.beam.search(first, width, seed, share)
        self.rounds += 1
        self.found = list(self.beam.best)
        if self.beam.pool and self.model.is_reversed:
            pool = self.beam.pool.reversed
            self.turned = {id(f): self.turned.get(id(f)) or (f, _turned(pool, f)) for f in self.found}
            self.found = [turned for _, turned in self.turned.values()]

    @property
    def best_s(self) -> float:
        return min((f.makespan_s for f in self.found), default=inf)


def _turned(pool: DevicePool, f: Found) -> Found:
    """A schedule of the reversed model with forward times, transfers charged to who receives."""
    runs = forward_on_pool(pool.problem, pool, f.model, f.runs)
    return Found(max(end for _, _, _, _, end, _ in runs), runs, f.model.reversed)


def search(
    problem: Problem,
    bound_s: float,
    work: Work,
    *,
    seed: int = 0,
    starts: Sequence[tuple[Slice, ...]] = (),
    is_warm: bool = False,
) -> list[tuple[Slice, ...]]:
    """Schedules, the most promising first; `starts` are schedules to begin from, besides the beams'.

    `is_warm`: the last of them is expected to be good, and beams begin with its order. Empty when memory lets no search
    finish.
    """
    model = make_model(problem, bound_s)
    work.spend(OUTSIDE_UNITS * max(0, len(model) - SMALL))
    pool: DevicePool | None = make_device_pool(problem)
    pool = pool if pool and pool.matters else None
    share = BEAM_SHARE if len(model) <= SMALL else BEAM_SHARE_LARGE
    found = given = [Found(max(s.end_s for s in slices), _runs(problem, model, slices), model) for slices in starts]
    guide = given[-1].runs if is_warm else ()
    if pool is None:
        found = found + _beams(_sides(model, None, work, guide), work, seed, share)
    else:
        found = found + _placed_starts(model, pool, work, seed, share, guide)
    found.sort(key=lambda f: f.makespan_s + _reduction_s(model, pool, f))
    annealers = _climb(model, pool, found, work, seed)
    finished = [finish(problem, c.model, _runs_of_annealer(c)) for c in annealers]
    own = [f for f in found if f not in given]
    others = own[:STARTS] + given if len(model) <= SMALL else found[:STARTS_LARGE]
    return finished + [finish(problem, f.model, f.runs) for f in others]


def _sides(model: Model, pool: DevicePool | None, work: Work, guide: Sequence[Run]) -> list[_Side]:
    """Forward and backward."""
    back, backward = model.reversed, pool.reversed if pool else None
    return [
        _Side(model, Beam(model, pool, work), guide=guide),
        _Side(back, Beam(back, backward, work), guide=forward_runs(back, list(guide)) if guide else ()),
    ]


def _placed_starts(
    model: Model, pool: DevicePool, work: Work, seed: int, share: float, guide: Sequence[Run]
) -> list[Found]:
    """Schedules on devices: of beams that know them, and of a search that only counts them and is charged afterwards.

    Both begin; what does better goes on. With few nodes that is often the second, which makes many more moves.
    """
    counting, placing = _sides(model, None, work, guide), _sides(model, pool, work, guide)
    blind = _charged(model, pool, work, _beams(counting, work, seed, BLIND_SHARE * share))
    found = _beams(placing, work, seed, 2 * BLIND_SHARE * share)
    if work.left(share) < 2 * beam_units(model, ROLL_OUT, pool.simulation_factor):
        return blind + found
    if min((f.makespan_s for f in blind), default=inf) > min((f.makespan_s for f in found), default=inf) * CLOSE_CALL:
        return blind + _beams(placing, work, seed + 50, share)
    schedules = _beams(counting, work, seed + 50, 0.75 * share)
    annealers = _climb(model, None, sorted(schedules, key=lambda f: f.makespan_s), work, seed, 1.2 * share)
    schedules += [Found(c.best.total_s, _runs_of_annealer(c), c.model) for c in annealers]
    return blind + found + _charged(model, pool, work, schedules)


def _charged(model: Model, pool: DevicePool, work: Work, blind: Sequence[Found]) -> list[Found]:
    """Schedules that know no devices, with devices and transfers: now and then better than what knew them."""
    decoder, found = PlacedDecoder(model, pool), []
    most = len(blind) if len(model) <= SMALL else STARTS_LARGE
    for f in sorted(blind, key=lambda f: f.makespan_s)[:most]:
        forward = forward_runs(f.model, f.runs)
        work.spend(2 * len(forward) * (pool.slice_units + HOLDING_PASSES / 2 * SLICE_UNITS))
        for draft in (_plain_draft(model, forward), draft_of(FlatDecoder(model), forward)):
            decoded = decoder.decode(draft, inf)
            if decoded is not None:
                found.append(Found(decoded[0], runs_of_draft(model, draft, decoded), model))
    return found


def _plain_draft(model: Model, runs: list[Run]) -> Draft:
    """Slices with their starts as ranks, none held."""
    draft: Draft = [[] for _ in range(len(model))]
    for m, c, layers, start, _, _ in runs:
        draft[m].append((c, layers, start, 0.0, 0))
    return draft


def _reduction_s(model: Model, pool: DevicePool | None, f: Found) -> float:
    """Seconds of gradient reductions after a placed schedule."""
    if pool is None or not pool.sharing:
        return 0.0
    forward = forward_runs(f.model, f.runs)
    starts: list[list[float]] = [[] for _ in range(len(model))]
    devices: list[list[int]] = [[] for _ in range(len(model))]
    for m, _, _, start_s, _, mask in forward:
        starts[m].append(start_s)
        devices[m].append(mask)
    decoded = (f.makespan_s, 0.0, starts, devices)
    return PlacedDecoder(model, pool).reduction_s(_plain_draft(model, forward), decoded)


def _runs(problem: Problem, model: Model, slices: Sequence[Slice]) -> list[Run]:
    runs = []
    for s in slices:
        m = problem.index[s.metaop]
        c = model.counts[m].index(len(s.devices))
        runs.append((m, c, s.num_layers, s.start_s, s.end_s, sum(1 << d for d in s.devices)))
    return sorted(runs, key=lambda run: (run[3], run[0]))


def _runs_of_annealer(annealer: Annealer) -> list[Run]:
    decoded = annealer.decoder.decode(annealer.best.draft, float("inf"))
    if decoded is None:
        raise AssertionError("the best draft does not decode any more")
    return runs_of_draft(annealer.model, annealer.best.draft, decoded)


def _close(model: Model, makespan_s: float) -> bool:
    return makespan_s <= model.bound_s * (1 + CLOSE_ENOUGH)


def beam_units(model: Model, width: Width, factor: float) -> float:
    """What a beam is expected to spend."""
    lp = LP_UNITS + COLUMN_UNITS * 0.6 * sum(map(len, model.hull))
    waiting = MOST_DECIDING // 2 if len(model) > HUGE else 1
    whole_run = (DECISION_UNITS * waiting + EVENT_UNITS) * model.total_layers * factor
    return width.states * width.heuristics * (width.epochs * lp + whole_run * (1 + width.epochs / 4))


def _beams(sides: list[_Side], work: Work, seed: int, share: float) -> list[Found]:
    """Wider and wider beams until the first `share` of the work is done; the best schedules of both directions.

    A larger budget begins with the beams of a smaller one.
    """
    for turn in count():
        side = sides[turn % 2] if turn < 4 else _chosen(sides, turn)
        left = work.left(share)
        if turn > 1 and (not left or _close(side.model, min(s.best_s for s in sides))):
            break
        factor = side.beam.pool.simulation_factor if side.beam.pool else 1.0
        affordable = [w for w in LADDER if beam_units(side.model, w, factor) <= left / 1.5]
        if turn > 0 and not affordable:
            break
        width = affordable[: turn // 2 + 1][-1] if affordable else ROLL_OUT
        side.search(_order(side, work, seed + turn), width, seed + turn, 1.0 if turn < 2 else share)
    return [f for side in sides for f in side.found]


def _chosen(sides: list[_Side], turn: int) -> _Side:
    best, other = sorted(sides, key=lambda s: s.best_s)
    return best if turn % 3 else other


def _order(side: _Side, work: Work, seed: int) -> list[int]:
    model = side.model
    if side.guide and not side.rounds:
        return by_schedule(model, side.guide, 8)
    kind = side.rounds % 3
    if kind == 1 and side.beam.best:
        return by_schedule(model, side.beam.best[0].runs, 8)
    if kind == 2 and len(model) <= SMALL:
        return by_search(model, side.beam.lp, work, 0.03 * work.total, seed)
    return by_level(model)


def _climb(
    model: Model, pool: DevicePool | None, found: list[Found], work: Work, seed: int, share: float = 1.0
) -> list[Annealer]:
    """Successive halving over annealers from the best schedules; best first."""
    most = 1 if len(model) > HUGE else STARTS if len(model) <= SMALL and pool is None else STARTS_LARGE
    annealers: list[Annealer] = []
    for i, f in enumerate(found[:most]):
        decoder: Decoder = FlatDecoder(f.model)
        runs = f.runs
        if pool is not None:
            decoder, runs = PlacedDecoder(model, pool), forward_on_pool(pool.problem, pool, f.model, f.runs)
        try:
            annealers.append(Annealer(decoder, draft_of(decoder, runs), work, seed + i))
        except Stuck:
            continue
    while annealers:
        annealers.sort(key=lambda c: c.best.total_s)
        left = work.left(share)
        if not left or _close(model, annealers[0].best.total_s):
            break
        if len(annealers) == 1:
            annealers[0].run(left, share)
            break
        for annealer in annealers:
            annealer.run(0.35 * left / len(annealers), share)
        annealers.sort(key=lambda c: c.best.total_s)
        del annealers[(len(annealers) + 1) // 2 :]
    return annealers

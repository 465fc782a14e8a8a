"""Run: a Problem and a budget of work in, the best schedules found out.

1. Beams on the model and on the reversed one (`sides`).
2. Annealing of the best schedules of both directions (`climb`). Without traffic a reversed schedule is improved in
   reversed time; with it, it is first read forward, since transfers are charged to who receives.
3. With traffic, beams that know devices and a search that only counts them both begin; what the latter finds is put on
   devices and charged. What does better gets most of the work.

All parts go on side by side in rounds (`work`), each with its share. Nothing in them knows the budget, so what a small
budget finds a larger one finds first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from spindle.plan import Slice
from spindle.planner.problem import Problem
from spindle.planner.search.beam import Found
from spindle.planner.search.climb import Climb
from spindle.planner.search.decode import HOLDING_PASSES, SLICE_UNITS, Decoder, Draft, FlatDecoder, draft_of
from spindle.planner.search.device_pool import DevicePool, make_device_pool
from spindle.planner.search.finish import finish, forward_on_pool, forward_runs, runs_of_draft
from spindle.planner.search.improve import CLOSE_ENOUGH, Annealer
from spindle.planner.search.list_scheduler import Run
from spindle.planner.search.model import Model, make_model
from spindle.planner.search.placed import PlacedDecoder
from spindle.planner.search.sides import SMALL, beams, both_sides
from spindle.planner.search.work import Part, Work

HUGE = 400  # MetaOps from which on one schedule is annealed
BEAM_SHARE, BEAM_SHARE_LARGE = 0.55, 0.9
CLOSE_CALL = 1.01
LEADING_SHARE = 0.8  # of the beams' work, for what does better with devices or without
BLIND_CLIMB_SHARE = 0.4  # of the work without devices, while that leads
STARTS, STARTS_LARGE = 6, 3
KEPT, KEPT_LARGE = 2, 1  # schedules of a kind that each round hands on
OUTSIDE_UNITS = 3000.0  # for each MetaOp beyond SMALL: the baselines, and finishing and costing what is found


def search(
    problem: Problem,
    bound_s: float,
    work: Work,
    *,
    seed: int = 0,
    starts: Sequence[tuple[Slice, ...]] = (),
    is_warm: bool = False,
) -> list[tuple[Slice, ...]]:
    """Schedules in the order in which they were found; `starts` are schedules to begin from, besides the beams'.

    `is_warm`: the last of them is expected to be good, and beams begin with its order. Empty when memory lets no search
    finish.
    """
    model = make_model(problem, bound_s)
    outside = OUTSIDE_UNITS * max(0, len(model) - SMALL)
    given = [Found(max(s.end_s for s in slices), _runs(problem, model, slices), model) for slices in starts]
    guide = given[-1].runs if is_warm else ()
    pool = make_device_pool(problem)
    parts = _Search(model, pool if pool.matters else None, work, seed, given, guide)
    most = KEPT if len(model) <= SMALL else KEPT_LARGE
    kept = {id(f): f for f in given} if len(model) <= SMALL else {}
    at = 0.0
    for end in work.rounds():
        parts.go_on(max(0.0, end - outside) - at)
        at = max(0.0, end - outside)
        for f in (*parts.ranked()[:most], *parts.climb.best(most)):
            kept.setdefault(id(f), f)
        if work.is_stopped or parts.best_s <= bound_s * (1 + CLOSE_ENOUGH):
            break
    return [finish(problem, f.model, f.runs) for f in kept.values()]


@dataclass
class _Search:
    """The parts of a search, each of which can be stopped and go on."""

    model: Model
    pool: DevicePool | None
    work: Work
    seed: int
    given: list[Found]
    guide: Sequence[Run]
    totals: dict[int, tuple[Found, float]] = field(default_factory=dict)  # by id: seconds with reductions
    charged: dict[int, tuple[Found, list[Found]]] = field(default_factory=dict)  # by id: what it is with devices

    def __post_init__(self) -> None:
        model, work, is_small = self.model, self.work, len(self.model) <= SMALL
        self.share = BEAM_SHARE if is_small else BEAM_SHARE_LARGE
        self.counting = both_sides(model, None, work, self.guide)
        self.blind_beams = Part(beams(self.counting, work, self.seed), work)
        most = 1 if len(model) > HUGE else STARTS if is_small and self.pool is None else STARTS_LARGE
        self.climb = Climb(self.ranked, self._annealer, most, self.seed)
        self.climbing = Part(self.climb.steps(), work)
        if self.pool is not None:
            self.placing = both_sides(model, self.pool, work, self.guide)
            self.placed_beams = Part(beams(self.placing, work, self.seed + 50), work)
            most = 1 if len(model) > HUGE else STARTS if is_small else STARTS_LARGE
            self.blind_climb = Climb(self._counted, self._blind_annealer, most, self.seed)
            self.blind_climbing = Part(self.blind_climb.steps(), work)

    def go_on(self, units: float) -> None:
        """Spend so much more work."""
        self._begin()
        share = self.share * units
        if self.pool is None:
            self.blind_beams.go_on(share)
        else:
            blind_s = min((f.makespan_s for f in self._charged()), default=inf)
            is_blind = blind_s <= min((s.best_s for s in self.placing), default=inf) * CLOSE_CALL
            placed = (1 - LEADING_SHARE if is_blind else LEADING_SHARE) * share
            climbing = BLIND_CLIMB_SHARE * (share - placed) if is_blind else 0.0
            self.placed_beams.go_on(placed)
            self.blind_beams.go_on(share - placed - climbing)
            self.blind_climbing.go_on(climbing)
            self._charge()
        self.climbing.go_on(units - share)

    def _begin(self) -> None:
        """The least that gives schedules, whatever the clock says: a simulation in each direction."""
        parts = [(self.counting, self.blind_beams)]
        if self.pool is not None:
            parts.append((self.placing, self.placed_beams))
        for sides, part in parts:
            while not all(side.rounds for side in sides):
                part.step()

    def ranked(self) -> list[Found]:
        """Schedules that annealing may begin with, those that take least with their reductions first."""
        own = [f for side in (self.counting if self.pool is None else self.placing) for f in side.found]
        found = [*self.given, *own, *self._charged()]
        for f in found:
            if id(f) not in self.totals:
                self.totals[id(f)] = f, f.makespan_s + _reduction_s(self.model, self.pool, f)
        return sorted(found, key=lambda f: self.totals[id(f)][1])

    @property
    def best_s(self) -> float:
        """Seconds of the best schedule, with its reductions."""
        best = self.ranked()[:1]
        annealed = min((a.best.total_s for a in self.climb.annealers), default=inf)
        return min(annealed, *(self.totals[id(f)][1] for f in best)) if best else annealed

    def _counted(self) -> list[Found]:
        """Schedules that know no devices."""
        return sorted((f for side in self.counting for f in side.found), key=lambda f: f.makespan_s)

    def _charged(self) -> list[Found]:
        return [f for _, found in self.charged.values() for f in found]

    def _charge(self) -> None:
        """Put the best schedules that know no devices on devices: now and then better than what knew them."""
        most = STARTS if len(self.model) <= SMALL else STARTS_LARGE
        begun = self.work.spent
        for f in (*self._counted()[:most], *self.blind_climb.best(1)):
            if id(f) not in self.charged and self.pool is not None:
                self.charged[id(f)] = f, _on_devices(self.model, self.pool, self.work, f)
        self.blind_beams.spent += self.work.spent - begun

    def _annealer(self, f: Found, seed: int) -> Annealer:
        if self.pool is None:
            return self._blind_annealer(f, seed)
        decoder = PlacedDecoder(self.model, self.pool)
        runs = forward_on_pool(self.pool.problem, self.pool, f.model, f.runs)
        return Annealer(decoder, draft_of(decoder, runs), self.work, seed)

    def _blind_annealer(self, f: Found, seed: int) -> Annealer:
        decoder: Decoder = FlatDecoder(f.model)
        return Annealer(decoder, draft_of(decoder, f.runs), self.work, seed)


def _on_devices(model: Model, pool: DevicePool, work: Work, f: Found) -> list[Found]:
    """A schedule that knows no devices, with devices and transfers."""
    decoder, found = PlacedDecoder(model, pool), []
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

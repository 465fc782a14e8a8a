"""Run: a Problem and a budget of work in, the best schedules found out.

1. Beams on the model and on the reversed one (`sides`).
2. Annealing of the best schedules of both directions (`climb`). Without traffic a reversed schedule is improved in
   reversed time; with it, it is first read forward, since transfers are charged to who receives.
3. With traffic, beams that know devices and a search that only counts them both begin; what the latter finds is put on
   devices and charged. What does better gets most of the work.

All this is done in stages, each longer than all before and from what these found (`work`). Nothing in it knows
the budget, so what a small budget finds a larger one finds first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

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
from spindle.planner.search.sides import HUGE, ROLL_OUT, SMALL, Sides, beam_units
from spindle.planner.work import Work, stages
from spindle.values.plan import Slice

BEAM_SHARE, BEAM_SHARE_LARGE = 0.55, 0.9
CLOSE_CALL = 1.01
BLIND_SHARE = 0.2  # of the beams' work, where devices matter: beams that only count them
STARTS, STARTS_LARGE = 6, 3
KEPT, KEPT_LARGE = 2, 1  # schedules of a kind that count at each look
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
    work.spend(OUTSIDE_UNITS * max(0, len(model) - SMALL))
    given = [Found(max(s.end_s for s in slices), _runs(problem, model, slices), model) for slices in starts]
    guide = given[-1].runs if is_warm else ()
    pool = make_device_pool(problem)
    parts = _Search(model, pool if pool.matters else None, work, seed, given, guide)
    most = KEPT if len(model) <= SMALL else KEPT_LARGE
    kept = {id(f): f for f in given} if len(model) <= SMALL else {}
    for _ in _at_each_look(work, parts):
        for f in (*parts.ranked()[:most], *parts.climb.best(most)):
            kept.setdefault(id(f), f)
    return [finish(problem, f.model, f.runs) for f in kept.values()]


def _at_each_look(work: Work, parts: "_Search") -> Iterator[None]:
    """Goes on with a search, and stops it, at a look, where the budget or the clock ends."""
    for _ in parts.begin():
        pass
    looks, steps = work.looks(), parts.steps()
    end: float | None = next(looks)
    while end is not None:
        is_done = False
        while work.spent < end and not is_done:
            is_done = next(steps, _DONE) is _DONE or work.is_stopped
        yield
        if is_done:
            return
        while end is not None and work.spent >= end:
            end = next(looks, None)


_DONE = object()


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
        model, work, seed = self.model, self.work, self.seed
        small = len(model) <= SMALL
        most = 1 if len(model) > HUGE else STARTS if small else STARTS_LARGE
        self.share = BEAM_SHARE if small else BEAM_SHARE_LARGE
        self.counting = Sides(model, None, work, seed, self.guide)
        self.placing = Sides(model, self.pool, work, seed + 50, self.guide) if self.pool else None
        self.blind_climb = Climb(self._counted, self._blind_annealer, most, seed, work)
        self.placed_climb = Climb(self.ranked, self._annealer, min(most, STARTS_LARGE), seed, work)

    @property
    def climb(self) -> Climb:
        """The one that comes last."""
        return self.placed_climb if self.pool else self.blind_climb

    def begin(self) -> Iterator[None]:
        """The least that gives schedules."""
        yield from self.counting.roll_out()
        if self.placing:
            yield from self.placing.roll_out()

    def steps(self) -> Iterator[None]:
        """Stage after stage, until a schedule is as good as the bound."""
        begun = self.work.spent
        for end in stages(is_large=len(self.model) > SMALL):
            if end <= begun:
                continue
            middle = begun + self.share * (end - begun)
            if self.placing:
                yield from self._on_devices(self.placing, begun, middle)
            else:
                yield from self.counting.beams(middle)
            if not self._is_close:
                yield from self.climb.steps(end)
            if self._is_close:
                return
            begun = max(begun, self.work.spent)

    def _on_devices(self, placing: Sides, begun: float, end: float) -> Iterator[None]:
        """Beams that know devices, and a search that only counts them and is charged afterwards. Both begin; what does
        better goes on. With few nodes that is often the second, which makes many more moves.
        """
        trial = BLIND_SHARE * (end - begun)
        yield from self.counting.beams(begun + trial)
        self._charge()
        yield from placing.beams(begun + 2 * trial)
        if end - self.work.spent < 2 * beam_units(self.model, ROLL_OUT, placing.factor):
            return
        blind_s = min((f.makespan_s for f in self._charged()), default=inf)
        if blind_s > placing.best_s * CLOSE_CALL:
            yield from placing.beams(end)
            return
        yield from self.counting.beams(begun + 0.75 * (end - begun))
        yield from self.blind_climb.steps(begun + 1.2 * (end - begun))
        self._charge()

    def ranked(self) -> list[Found]:
        """Schedules that annealing may begin with; the shortest with their reductions come first."""
        found = [*self.given, *(self.placing or self.counting).found, *self._charged()]
        for f in found:
            if id(f) not in self.totals:
                self.totals[id(f)] = f, f.makespan_s + _reduction_s(self.model, self.pool, f)
        return sorted(found, key=lambda f: self.totals[id(f)][1])

    @property
    def _is_close(self) -> bool:
        best_s = min((a.best.total_s for a in self.climb.annealers), default=inf)
        best_s = min([best_s, *(self.totals[id(f)][1] for f in self.ranked()[:1])])
        return best_s <= self.model.bound_s * (1 + CLOSE_ENOUGH)

    def _counted(self) -> list[Found]:
        """Schedules that know no devices."""
        own = self.given if self.pool is None else []
        return sorted([*own, *self.counting.found], key=lambda f: f.makespan_s)

    def _charged(self) -> list[Found]:
        return [f for _, found in self.charged.values() for f in found]

    def _charge(self) -> None:
        """Put the best schedules that know no devices on devices: now and then better than what knew them."""
        most = STARTS if len(self.model) <= SMALL else STARTS_LARGE
        for f in (*self._counted()[:most], *self.blind_climb.best(1)):
            if id(f) not in self.charged and self.pool is not None:
                self.charged[id(f)] = f, _on_devices(self.model, self.pool, self.work, f)

    def _annealer(self, f: Found, seed: int) -> Annealer:
        assert self.pool is not None
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
